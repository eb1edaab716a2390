"""TrainState and the train step: jitted, mesh-sharded programs from packed micro-batches to new weights."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vigos_jax.method.losses import entry_shares, entry_weights, role_losses, role_stats
from vigos_jax.method.roles import TeacherRole
from vigos_jax.method.scoring import loss_of_batch
from vigos_jax.models.inputs import ScoreBatch
from vigos_jax.models.variables import teacher_overlay
from vigos_jax.models.vlm import VisionLanguageModel
from vigos_jax.runtime.sharding import replicated

Array = jax.Array


@flax.struct.dataclass
class TrainState:
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


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The jitted programs of one optimizer step, and how they follow each other.

    Attributes:
      shares_of: batch -> [R], what each role's mean is divided by, of one micro-batch.
      gradient: (trained, base, average, batch, shares, key) -> sums over a micro-batch, the gradient among them.
      add: (sums, sums) -> sums; the first are donated.
      update: (state, sums, shares) -> (state, metrics); the state is donated.
    """

    shares_of: Callable
    gradient: Callable
    add: Callable
    update: Callable

    def __call__(
        self, state: TrainState, base: Any, batches: Sequence[ScoreBatch], key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        shares = sum(self.shares_of(batch) for batch in batches)
        sums = None
        for i, batch in enumerate(batches):
            part = self.gradient(state.trained, base, state.average, batch, shares, jax.random.fold_in(key, i))
            sums = part if sums is None else self.add(sums, part)
        return self.update(state, sums, shares)


def make_optimizer(
    *,
    learning_rate: float,
    steps: int,
    warmup_steps: int,
    schedule: str,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
) -> tuple[optax.GradientTransformation, Callable[[Array], Array]]:
    """AdamW behind a clip of the global norm, and its learning-rate schedule.

    Args:
      schedule: "linear" decays from learning_rate to 0 at `steps`, "constant" stays.
    """
    if schedule == "linear":
        decay = optax.linear_schedule(learning_rate, 0.0, max(1, steps - warmup_steps))
    else:
        decay = optax.constant_schedule(learning_rate)
    if warmup_steps:
        # The first step already moves: warm up from 1/n, not from 0.
        up = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, max(1, warmup_steps - 1))
        decay = optax.join_schedules([up, decay], [warmup_steps])
    tx = optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(decay, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
    )
    return tx, decay


def make_train_step(
    model: VisionLanguageModel,
    tx: optax.GradientTransformation,
    *,
    roles: tuple[TeacherRole, ...],
    chunk: int,
    use_dropout: bool,
    temperature: float = 1.0,
    reduction: str = "tokens",
    teacher_weights: str = "frozen",
    ema_rate: float = 0.0,
    shardings: Any = None,
) -> TrainStep:
    """Returns `train_step(state, base, batches, key) -> (state, metrics)`; `state` is donated.

    The micro-batches may have shapes of their own: a program is compiled for each shape, and one for the update.
    Every term is divided by its shares in all of them together, never per micro-batch.

    A step whose loss or gradient is not finite changes nothing but the number of steps.

    Metrics, beside loss and gradient norm:
      skipped: 1 for such a step, else 0.
      sampler_logp_gap: mean |logp by the sampler - logp by the student| of the supervised tokens: float noise if
        both are the same model, plus the adapter's dropout, which only the student has.
      entropy: mean over the supervised tokens of the student's distribution, in nats.
      ROLE/loss, ROLE/tokens, ROLE/clipped_fraction: the role's mean, its tokens, and the share of them clipped.
      ROLE/loss_share: of the weighted sum of means.
      ROLE/grad_share: of the roles' gradient norms at the student's last hidden states, before the head. (Shares at
        the parameters would take a backward pass per role.)

    Args:
      temperature, reduction: of the divergence and of its mean, see `losses`.
      teacher_weights: see `teacher_overlay`.
      ema_rate: how far the average moves towards the trained weights after each step, for "ema".
      shardings: of (state, metrics), where they are on a mesh.
    """
    count = len(roles)

    def loss_fn(trained: Any, probe: Array, base: Any, average: Any, batch: ScoreBatch, shares: Array, key: Array):
        loss, scores = loss_of_batch(
            model,
            base,
            trained,
            batch,
            entry_weights(batch.entries, shares, roles=roles, reduction=reduction),
            roles=roles,
            chunk=chunk,
            temperature=temperature,
            overlay=teacher_overlay(teacher_weights, trained=trained, average=average),
            dropout_key=key if use_dropout else None,
            probe=probe,
        )
        stats = role_stats(scores, batch.entries, count=count, reduction=reduction)
        gap = jnp.abs(scores.student_logp - batch.entries.sampled_logp)
        known = (batch.entries.role >= 0) & ~jnp.isnan(gap)
        gaps = jnp.stack([jnp.sum(jnp.where(known, gap, 0.0)), jnp.sum(known)])
        return loss, (stats, gaps)

    def gradient(trained: Any, base: Any, average: Any, batch: ScoreBatch, shares: Array, key: Array):
        """Sums over a micro-batch: its part of the loss, statistics, squared state gradients per role, gradient."""
        probe = jnp.zeros((*batch.entries.role.shape, model.config.hidden_size), model.dtype)
        grad_fn = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        (loss, (stats, gaps)), (grads, at_states) = grad_fn(trained, probe, base, average, batch, shares, key)
        one_hot = batch.entries.role[..., None] == jnp.arange(count)
        squares = jnp.sum(jnp.square(at_states.astype(jnp.float32)), -1, keepdims=True)
        return loss, stats, gaps, jnp.sum(jnp.where(one_hot, squares, 0.0), (0, 1)), grads

    def shares_of(batch: ScoreBatch) -> Array:
        return jnp.sum(entry_shares(batch.entries, count=count, reduction=reduction), (0, 1))  # [R]

    def update(state: TrainState, sums: Any, shares: Array):
        loss, stats, gaps, state_squares, grads = sums
        grad_norm = optax.tree.norm(grads)
        is_sound = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        average = optax.incremental_update(trained, state.average, ema_rate) if state.average else state.average
        new, old = (trained, opt_state, average), (state.trained, state.opt_state, state.average)
        trained, opt_state, average = jax.tree.map(lambda a, b: jnp.where(is_sound, a, b), new, old)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "skipped": jnp.float32(~is_sound),
            "sampler_logp_gap": gaps[0] / jnp.maximum(gaps[1], 1.0),
            "entropy": jnp.sum(stats.entropy) / jnp.maximum(jnp.sum(stats.tokens), 1.0),
        }
        losses, norms = role_losses(stats, shares), jnp.sqrt(state_squares)
        for r, role in enumerate(roles):
            metrics[f"{role.name}/loss"] = losses[r]
            metrics[f"{role.name}/tokens"] = stats.tokens[r]
            metrics[f"{role.name}/clipped_fraction"] = stats.clipped_tokens[r] / jnp.maximum(stats.tokens[r], 1.0)
            metrics[f"{role.name}/loss_share"] = _share(role.weight * losses[r], loss)
            metrics[f"{role.name}/grad_share"] = _share(norms[r], jnp.sum(norms))
        state = TrainState(step=state.step + 1, trained=trained, opt_state=opt_state, average=average)
        return state, metrics

    add = functools.partial(jax.tree.map, jnp.add)
    out = {} if shardings is None else {"out_shardings": shardings}
    return TrainStep(
        shares_of=jax.jit(shares_of),
        gradient=jax.jit(gradient),
        add=jax.jit(add, donate_argnums=0),
        update=jax.jit(update, donate_argnums=0, **out),
    )


def train_step_of(
    config, model: VisionLanguageModel, roles: tuple[TeacherRole, ...], tx: Any, state: TrainState
) -> TrainStep:
    """The step that a config asks for. state: of arrays, or of shapes with the shardings that they will have."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return make_train_step(
        model,
        tx,
        roles=roles,
        chunk=config.loss.chunk,
        use_dropout="lora" in state.trained and model.lora.dropout > 0,
        temperature=config.loss.temperature,
        reduction=config.loss.reduction,
        teacher_weights=config.teacher.weights,
        ema_rate=config.teacher.ema_rate,
        shardings=(shardings, replicated(model.mesh)),
    )


def _share(part: Array, whole: Array) -> Array:
    return jnp.where(whole != 0, part / jnp.where(whole != 0, whole, 1.0), 0.0)
