"""The segment-masked divergence: exact KL over the full vocabulary, never holding [T, V] logits.

Equations 18-21 of the ViGOS paper. For every supervised entry, with teacher q and student p over the vocabulary,

    forward  KL(q || p) = sum_v q_v (log q_v - log p_v)
    reverse  KL(p || q) = sum_v p_v (log p_v - log q_v)

in float32, clipped per token after the sum over v, averaged over each role's own tokens of the global batch.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from vigos_jax.inputs import Entries
from vigos_jax.roles import TeacherRole

Array = jax.Array


@flax.struct.dataclass
class EntryScores:
    """Per entry, float32 [B, E]: the unclipped divergence and both log-probabilities of the observed token."""

    kl: Array
    student_logp: Array
    teacher_logp: Array


@flax.struct.dataclass
class RoleStats:
    """Per role, float32 [R]: sum of clipped divergences, number of tokens, number of clipped tokens."""

    clipped_kl_sum: Array
    tokens: Array
    clipped_tokens: Array


def divergence(student_logits: Array, teacher_logits: Array, is_reverse: Array) -> tuple[Array, Array, Array]:
    """KL per entry, and both log-softmaxes. Logits [..., V], is_reverse [...]: KL(p || q) instead of KL(q || p)."""
    log_p = jax.nn.log_softmax(student_logits.astype(jnp.float32))
    log_q = jax.nn.log_softmax(teacher_logits.astype(jnp.float32))
    reverse = is_reverse[..., None]
    log_a, log_b = jnp.where(reverse, log_p, log_q), jnp.where(reverse, log_q, log_p)
    return jnp.sum(jnp.exp(log_a) * (log_a - log_b), -1), log_p, log_q


def score_entries(
    student_hidden: Array,
    teacher_hidden: Array,
    entries: Entries,
    *,
    roles: tuple[TeacherRole, ...],
    student_head: Callable[[Array], Array],
    teacher_head: Callable[[Array], Array],
    chunk: int,
) -> EntryScores:
    """Applies both heads and the divergence to `chunk` entries of every row at a time.

    The backward pass recomputes each chunk's logits, so at no time do more than [B, chunk, V] of them exist.

    Args:
      student_hidden, teacher_hidden: [B, E, D], the states of each entry.
      student_head, teacher_head: hidden [..., D] to logits [..., V].
      chunk: entries per row and pass; E need not be a multiple of it.
    """
    reverse_roles = jnp.array([r.divergence == "reverse_kl" for r in roles])
    b, e, _ = student_hidden.shape
    chunk = min(chunk, e)
    n = -(-e // chunk)

    def split(x: Array) -> Array:  # [B, E, ...] -> [n, B, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, n * chunk - e)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, n, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(student: Array, teacher: Array, role: Array, token: Array) -> EntryScores:
        kl, log_p, log_q = divergence(student_head(student), teacher_head(teacher), reverse_roles[role])
        pick = lambda x: jnp.take_along_axis(x, token[..., None], -1)[..., 0]  # noqa: E731
        return EntryScores(kl, pick(log_p), pick(log_q))

    parts = (student_hidden, teacher_hidden, jnp.maximum(entries.role, 0), entries.token)
    _, scores = jax.lax.scan(lambda _, x: (None, one(*x)), None, jax.tree.map(split, parts))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, n * chunk)[:, :e], scores)


def clip_kl(kl: Array, role: Array, roles: tuple[TeacherRole, ...]) -> Array:
    """min(kl, clip of its role); a clipped entry has zero gradient."""
    clips = jnp.array([r.clip or jnp.inf for r in roles], jnp.float32)
    return jnp.minimum(kl, clips[role])


def role_stats(scores: EntryScores, entries: Entries, *, roles: tuple[TeacherRole, ...]) -> RoleStats:
    """Sums per role over all entries given; sums of several micro-batches add up."""
    one_hot = entries.role[..., None] == jnp.arange(len(roles))  # [B, E, R]
    clipped = clip_kl(scores.kl, jnp.maximum(entries.role, 0), roles)
    total = lambda x: jnp.sum(jnp.where(one_hot, x[..., None], 0.0), (0, 1))  # noqa: E731
    return RoleStats(
        clipped_kl_sum=total(clipped),
        tokens=total(jnp.ones_like(scores.kl)),
        clipped_tokens=total((scores.kl > clipped).astype(jnp.float32)),
    )


def role_losses(stats: RoleStats, tokens: Array) -> Array:
    """Mean clipped divergence per role, [R]; `tokens` [R] counts the global batch. A role without tokens gives 0."""
    return stats.clipped_kl_sum / jnp.maximum(tokens, 1.0)


def total_loss(stats: RoleStats, tokens: Array, *, roles: tuple[TeacherRole, ...]) -> Array:
    """Equation 18: the weighted sum of the roles' means."""
    return jnp.dot(jnp.array([r.weight for r in roles], jnp.float32), role_losses(stats, tokens))
