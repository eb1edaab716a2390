"""TrainState and the train step: jitted, mesh-sharded programs from packed micro-batches to new weights."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vigos_jax.method.batch import ScoreBatch, SupervisedTokens
from vigos_jax.method.losses import (
    ObjectiveConfig,
    RoleStats,
    TokenScores,
    loss_weights,
    normalizer_terms,
    role_losses,
    role_stats,
    weighted_loss,
)
from vigos_jax.method.scoring import NO_OTHERS, TeacherModel, supervised_states
from vigos_jax.method.token_weights import token_weights
from vigos_jax.models.variables import teacher_params_of
from vigos_jax.models.vlm import VisionLanguageModel
from vigos_jax.runtime.sharding import replicated

Array = jax.Array


class TrainState(flax.struct.PyTreeNode):
    """What changes while training; the frozen base is passed beside it.

    Attributes:
      step: int32 scalar, optimizer steps taken.
      trained: `{"lora": ...}` or `{"params": ...}`, float32.
      opt_state: optimizer state, for the trained leaves only.
      average: moving average of `trained`, for teachers that follow it; else `{}`.
    """

    step: Array
    trained: Any
    opt_state: Any
    average: Any


class StepSums(flax.struct.PyTreeNode):
    """Sums over the supervised tokens of a micro-batch; those of a step's micro-batches add up.

    Attributes:
      loss: scalar, the weighted sum of clipped divergences.
      stats: per role.
      sampler_gap, sampler_tokens: scalars, |logp by the sampler - logp by the student| over the tokens whose
        sampler is known, and their number.
      squares: [R], squared gradients of the loss at the student's last hidden states.
      gradient: of the loss, in the form of `TrainState.trained`.
    """

    loss: Array
    stats: RoleStats
    sampler_gap: Array
    sampler_tokens: Array
    squares: Array
    gradient: Any


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The jitted programs of one optimizer step, and how they follow each other.

    Attributes:
      normalizers_of: batch -> [R], a micro-batch's part of what each role's mean is divided by.
      gradient: (trained, base, average, batch, normalizers, key, others) -> StepSums of a micro-batch.
      add: (sums, sums) -> sums; the first are donated.
      update: (state, sums, normalizers) -> (state, metrics); the state is donated.
    """

    normalizers_of: Callable
    gradient: Callable
    add: Callable
    update: Callable

    def __call__(
        self,
        state: TrainState,
        base: Any,
        batches: Sequence[ScoreBatch],
        key: Array,
        *,
        others: Mapping[str, TeacherModel] = NO_OTHERS,
    ) -> tuple[TrainState, dict[str, Array]]:
        """One optimizer step on micro-batches; `state` is donated. others: see `supervised_states`."""
        normalizers = sum(self.normalizers_of(batch) for batch in batches)
        sums = None
        for i, batch in enumerate(batches):
            frozen, own_key = (base, state.average, batch, normalizers), jax.random.fold_in(key, i)
            part = self.gradient(state.trained, *frozen, own_key, dict(others))
            sums = part if sums is None else self.add(sums, part)
        return self.update(state, sums, normalizers)


def make_optimizer(options, *, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW after a clip of the global norm, and its learning-rate schedule.

    Args:
      options: `config.optimizer`.
      steps: of the whole run; the schedule "linear" decays from the learning rate to 0 there, "constant" stays.
    """
    rate, warmup = options.learning_rate, options.warmup_steps
    if options.schedule == "linear":
        schedule = optax.linear_schedule(rate, 0.0, max(1, steps - warmup))
    else:
        schedule = optax.constant_schedule(rate)
    if warmup:
        # The first step already moves: warm up from 1/n, not from 0.
        up = optax.linear_schedule(rate / warmup, rate, max(1, warmup - 1))
        schedule = optax.join_schedules([up, schedule], [warmup])
    adamw = optax.adamw(schedule, b1=options.b1, b2=options.b2, eps=options.eps, weight_decay=options.weight_decay)
    return optax.chain(optax.clip_by_global_norm(options.max_grad_norm), adamw), schedule


def make_train_step(
    model: VisionLanguageModel,
    tx: optax.GradientTransformation,
    objective: ObjectiveConfig,
    *,
    use_dropout: bool,
    teacher_weights: str = "frozen",
    ema_rate: float = 0.0,
    shardings: Any = None,
) -> TrainStep:
    """Returns `train_step(state, base, batches, key) -> (state, metrics)`; `state` is donated.

    Micro-batches may differ in shape: programs are compiled for each shape, but the update only once.
    Every mean is over all of them together, never per micro-batch.

    A step whose loss or gradient is not finite changes nothing but the number of steps. Metrics: see `_metrics`.

    Args:
      teacher_weights: see `teacher_params_of`.
      ema_rate: how far the average moves towards the trained weights after each step, for "ema".
      shardings: of (state, metrics), where they are on a mesh.
    """
    out = {} if shardings is None else {"out_shardings": shardings}
    return TrainStep(
        normalizers_of=jax.jit(functools.partial(_normalizers, objective)),
        gradient=jax.jit(LossGradient(model, objective, use_dropout, teacher_weights)),
        add=jax.jit(functools.partial(jax.tree.map, jnp.add), donate_argnums=0),
        update=jax.jit(Update(tx, objective, ema_rate), donate_argnums=0, **out),
    )


@dataclasses.dataclass(frozen=True)
class LossGradient:
    """The loss and gradient of one micro-batch: a pure function; instances with equal attributes compare equal.

    Attributes: see `make_train_step`.
    """

    model: VisionLanguageModel
    objective: ObjectiveConfig
    use_dropout: bool
    teacher_weights: str

    def __call__(
        self,
        trained: Any,
        base: Any,
        average: Any,
        batch: ScoreBatch,
        normalizers: Array,
        key: Array,
        others: Mapping[str, TeacherModel],
    ) -> StepSums:
        """Arguments: see `TrainStep.gradient`."""

        def loss_fn(trained: Any, probe: Array) -> tuple[Array, TokenScores]:
            states = supervised_states(
                self.model,
                base,
                trained,
                batch,
                teacher_params=teacher_params_of(self.teacher_weights, trained=trained, average=average),
                others=others,
                dropout_key=key if self.use_dropout else None,
            )
            states = states.replace(student=states.student + probe)
            rule = token_weights(states, batch.supervised, self.objective)
            weights = rule * loss_weights(batch.supervised, normalizers, self.objective)
            trains_head = "params" in trained
            loss, scores = weighted_loss(states, batch.supervised, weights, self.objective, trains_head=trains_head)
            return loss, scores.replace(weight=rule)

        # Zeros added to the student's states: the loss's gradient there is its gradient at those states.
        probe = jnp.zeros((*batch.supervised.role.shape, self.model.config.hidden_size), self.model.dtype)
        grad_fn = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        (loss, scores), gradients = grad_fn(trained, probe)
        return _sums(loss, scores, gradients, batch.supervised, self.objective)


@dataclasses.dataclass(frozen=True)
class Update:
    """New weights from a step's sums; a pure function, like `LossGradient`.

    Attributes: see `make_train_step`.
    """

    tx: optax.GradientTransformation
    objective: ObjectiveConfig
    ema_rate: float

    def __call__(self, state: TrainState, sums: StepSums, normalizers: Array) -> tuple[TrainState, dict[str, Array]]:
        """Arguments: see `TrainStep.update`."""
        grad_norm = optax.tree.norm(sums.gradient)
        is_finite = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
        new = _updated(state, sums.gradient, self.tx, ema_rate=self.ema_rate)
        state = jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, state).replace(step=new.step)
        norms = {"grad_norm": grad_norm, "skipped": jnp.float32(~is_finite)}
        return state, norms | _metrics(sums, normalizers, self.objective)


def _normalizers(objective: ObjectiveConfig, batch: ScoreBatch) -> Array:  # [R]
    return jnp.sum(normalizer_terms(batch.supervised, objective), (0, 1))


def _sums(
    loss: Array, scores: TokenScores, gradients: tuple[Any, Array], tokens: SupervisedTokens, objective: ObjectiveConfig
) -> StepSums:
    """gradients: of the loss at what is trained, and at the student's states [B, E, D]."""
    trained, at_states = gradients
    gap = jnp.abs(scores.student_logp - tokens.sampled_logp)
    is_known = (tokens.role >= 0) & ~jnp.isnan(gap)
    one_hot = tokens.role[..., None] == jnp.arange(len(objective.roles))
    squares = jnp.sum(jnp.square(at_states.astype(jnp.float32)), -1, keepdims=True)
    return StepSums(
        loss=loss,
        stats=role_stats(scores, tokens, objective),
        sampler_gap=jnp.sum(jnp.where(is_known, gap, 0.0)),
        sampler_tokens=jnp.sum(is_known).astype(jnp.float32),
        squares=jnp.sum(jnp.where(one_hot, squares, 0.0), (0, 1)),
        gradient=trained,
    )


def _updated(state: TrainState, gradient: Any, tx: optax.GradientTransformation, *, ema_rate: float) -> TrainState:
    updates, opt_state = tx.update(gradient, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    average = optax.incremental_update(trained, state.average, ema_rate) if state.average else state.average
    return TrainState(step=state.step + 1, trained=trained, opt_state=opt_state, average=average)


def _metrics(sums: StepSums, normalizers: Array, objective: ObjectiveConfig) -> dict[str, Array]:
    """The metrics of a step besides `grad_norm` and `skipped`.

    sampler_logp_gap: mean |logp by the sampler - logp by the student| of the supervised tokens: float noise if both
      are the same model, plus the adapter's dropout, which only the student has.
    entropy: mean over the supervised tokens of the student's distribution, in nats.
    ROLE/loss, ROLE/tokens, ROLE/clipped_fraction: the role's mean, its tokens, and the fraction of them clipped.
    ROLE/loss_share: the role's fraction of the loss.
    ROLE/effective_tokens: effective sample size (sum w)^2 / sum w^2, for roles with a token-weight rule.
    ROLE/grad_share: the role's fraction of the sum of the roles' gradient norms at the student's last hidden states,
      before the head. (Fractions at the parameters would need a backward pass per role.)
    """
    stats, norms = sums.stats, jnp.sqrt(sums.squares)
    metrics = {
        "loss": sums.loss,
        "sampler_logp_gap": sums.sampler_gap / jnp.maximum(sums.sampler_tokens, 1.0),
        "entropy": jnp.sum(stats.entropy) / jnp.maximum(jnp.sum(stats.tokens), 1.0),
    }
    losses = role_losses(stats, normalizers)
    for r, role in enumerate(objective.roles):
        metrics[f"{role.name}/loss"] = losses[r]
        metrics[f"{role.name}/tokens"] = stats.tokens[r]
        metrics[f"{role.name}/clipped_fraction"] = stats.clipped_tokens[r] / jnp.maximum(stats.tokens[r], 1.0)
        if role.token_weights != "uniform":  # weights have the mean 1
            metrics[f"{role.name}/effective_tokens"] = _share(jnp.square(stats.tokens[r]), stats.squares[r])
        metrics[f"{role.name}/loss_share"] = _share(role.weight * losses[r], sums.loss)
        metrics[f"{role.name}/grad_share"] = _share(norms[r], jnp.sum(norms))
    return metrics


def train_step_of(
    config, model: VisionLanguageModel, objective: ObjectiveConfig, tx: Any, state: TrainState
) -> TrainStep:
    """The step that a config asks for. state: of arrays, or of shapes with the shardings that they will have."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    if model.mesh is None:
        raise ValueError("a run's model has a mesh")
    return make_train_step(
        model,
        tx,
        objective,
        use_dropout="lora" in state.trained and model.lora is not None and model.lora.dropout > 0,
        teacher_weights=config.teacher.weights,
        ema_rate=config.teacher.ema_rate,
        shardings=(shardings, replicated(model.mesh)),
    )


def _share(part: Array, whole: Array) -> Array:
    return jnp.where(whole != 0, part / jnp.where(whole != 0, whole, 1.0), 0.0)
