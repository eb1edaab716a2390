"""TrainState and the train step: one jitted, mesh-sharded program from a packed batch to new weights."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vigos_jax.inputs import ScoreBatch
from vigos_jax.losses import RoleStats, role_losses, role_stats, total_loss
from vigos_jax.models.qwen2_5_vl import Qwen2_5VL
from vigos_jax.roles import TeacherRole
from vigos_jax.score import score_batch

Array = jax.Array


@flax.struct.dataclass
class TrainState:
    """What changes while training; the frozen base is passed beside it.

    Attributes:
      step: int32 scalar, optimizer steps taken.
      trained: `{"lora": ...}` or `{"params": ...}`, float32.
      opt_state: optimizer state, for the trained leaves only.
    """

    step: Array
    trained: Any
    opt_state: Any


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
    model: Qwen2_5VL,
    tx: optax.GradientTransformation,
    *,
    roles: tuple[TeacherRole, ...],
    chunk: int,
    accumulation: int,
    use_dropout: bool,
) -> Callable[[TrainState, Any, ScoreBatch, Array], tuple[TrainState, dict[str, Array]]]:
    """Returns `train_step(state, base, batch, key) -> (state, metrics)`, to be jitted with `state` donated.

    With `accumulation` > 1 the batch is walked in strided micro-batches (rows a, a + n, ...), so that each of them
    stays spread over all devices. Every term is divided by its tokens in the whole batch, never per micro-batch.

    Among the metrics, `sampler_logp_gap` is the mean |logp by the sampler - logp by the student| of the supervised
    tokens: float noise if both are the same model, plus the adapter's dropout, which only the student has.
    """

    def loss_fn(trained: Any, base: Any, batch: ScoreBatch, tokens: Array, key: Array):
        scores = score_batch(
            model, base, trained, batch, roles=roles, chunk=chunk, dropout_key=key if use_dropout else None
        )
        stats = role_stats(scores, batch.entries, roles=roles)
        used = batch.entries.role >= 0
        gap = jnp.abs(jax.lax.stop_gradient(scores.student_logp) - batch.entries.sampled_logp)
        known = used & ~jnp.isnan(gap)
        extra = jnp.stack([jnp.sum(jnp.where(known, gap, 0.0)), jnp.sum(known)])
        return total_loss(stats, tokens, roles=roles), (stats, extra)

    def train_step(state: TrainState, base: Any, batch: ScoreBatch, key: Array):
        tokens = jnp.stack([jnp.sum(batch.entries.role == r) for r in range(len(roles))]).astype(jnp.float32)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

        if accumulation == 1:
            (loss, (stats, extra)), grads = grad_fn(state.trained, base, batch, tokens, key)
        else:
            micro = jax.tree.map(
                lambda x: jnp.swapaxes(x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]), 0, 1), batch
            )

            def add(total: Any, x: tuple[ScoreBatch, Array]):
                out = grad_fn(state.trained, base, x[0], tokens, x[1])
                return jax.tree.map(jnp.add, total, out), None

            r = jnp.zeros(len(roles))
            zero = ((jnp.zeros(()), (RoleStats(r, r, r), jnp.zeros(2))), jax.tree.map(jnp.zeros_like, state.trained))
            keys = jax.random.split(key, accumulation)
            ((loss, (stats, extra)), grads), _ = jax.lax.scan(add, zero, (micro, keys))

        updates, opt_state = tx.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        per_role = role_losses(stats, tokens)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "sampler_logp_gap": extra[0] / jnp.maximum(extra[1], 1.0),
        }
        for r, role in enumerate(roles):
            metrics[f"{role.name}/loss"] = per_role[r]
            metrics[f"{role.name}/tokens"] = tokens[r]
            metrics[f"{role.name}/clipped_fraction"] = stats.clipped_tokens[r] / jnp.maximum(tokens[r], 1.0)
        return TrainState(step=state.step + 1, trained=trained, opt_state=opt_state), metrics

    return train_step
