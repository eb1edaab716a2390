"""The segment-masked divergence over the full vocabulary, without ever holding [T, V] logits.

Equations 18-21 of the ViGOS paper. Every supervised entry has a divergence between its teacher and the student (see
`divergences`), in float32, clipped per token after the sum over the vocabulary (or every term of it), and averaged over
each role's own tokens of the global batch. A role's mean is `sum(share * divergence) / sum(share)`: a share is 1 to
average over tokens, and one over the number of the role's tokens in the rollout to average over rollouts.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from vigos_jax.method.divergences import divergence, log_softmax
from vigos_jax.method.roles import TeacherRole
from vigos_jax.models.inputs import Entries

Array = jax.Array


@flax.struct.dataclass
class EntryScores:
    """Per entry, float32 [B, E].

    Attributes:
      kl: the role's divergence, before the clip per token.
      student_logp, teacher_logp: log-probabilities of the observed token, at temperature 1.
      entropy: of the student's distribution, at temperature 1.
    """

    kl: Array
    student_logp: Array
    teacher_logp: Array
    entropy: Array


@flax.struct.dataclass
class RoleStats:
    """Sums per role over entries, float32 [R]; those of several micro-batches add up.

    Attributes:
      loss: of share * clipped divergence.
      shares, tokens, clipped_tokens: of the shares, of ones, of ones where the clip per token bites.
      entropy: of the student's entropy.
    """

    loss: Array
    shares: Array
    tokens: Array
    clipped_tokens: Array
    entropy: Array


def score_entries(
    student_hidden: Array,
    student_head: Array,
    teacher_hidden: Array,
    teacher_head: Array | None,
    entries: Entries,
    *,
    roles: tuple[TeacherRole, ...],
    temperature: float,
    chunk: int,
) -> EntryScores:
    """The scores of all entries, `chunk` of every row at a time: no more than [B, chunk, V] logits exist.

    Args:
      student_hidden, teacher_hidden: [B, E, D], the states of each entry.
      student_head, teacher_head: [V, D]; a state's logits are its products with the rows. None for the teacher's
        if it is the student's: then one product serves both.
      temperature: of the divergence.
      chunk: entries per row and pass; E need not be a multiple of it.
    """

    def one(student: Array, teacher: Array, role: Array, token: Array) -> EntryScores:
        logits = _both_logits(student, student_head, teacher, teacher_head)
        kl, _ = divergence(*logits, role, roles=roles, temperature=temperature)
        return _scores(*logits, kl, token)

    parts = (student_hidden, teacher_hidden, jnp.maximum(entries.role, 0), entries.token)
    return _in_chunks(one, parts, chunk)


def weighted_loss(
    student_hidden: Array,
    student_head: Array,
    teacher_hidden: Array,
    teacher_head: Array | None,
    entries: Entries,
    weights: Array,
    *,
    roles: tuple[TeacherRole, ...],
    temperature: float,
    chunk: int,
    trains_head: bool,
) -> tuple[Array, EntryScores]:
    """Equation 18 as a sum over entries of weight * clipped divergence, differentiable in student states and head.

    The gradient is computed in the forward pass, while a chunk's logits are at hand, and only scaled in the backward
    pass: two products with a head for the value and one for the gradient (two if the head is trained), nothing
    recomputed, and no more than [B, chunk, V] logits at any time. The scores carry no gradient.

    Args:
      weights: float32 [B, E], zero for unused slots; see `entry_weights`. Other arguments as of `score_entries`.
      trains_head: whether a gradient is wanted for `student_head`; without, it is taken for a constant.
    """
    statics = roles, temperature, chunk, trains_head
    if not trains_head:
        student_head = jax.lax.stop_gradient(student_head)
    return _weighted_loss(statics, student_hidden, student_head, teacher_hidden, teacher_head, entries, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_loss(statics, student_hidden, student_head, teacher_hidden, teacher_head, entries, weights):
    roles, temperature, chunk, _ = statics
    scores = score_entries(
        student_hidden, student_head, teacher_hidden, teacher_head, entries,
        roles=roles, temperature=temperature, chunk=chunk,
    )  # fmt: skip
    return jnp.sum(weights * jnp.minimum(scores.kl, entries.clip)), scores


def _weighted_loss_forward(statics, student_hidden, student_head, teacher_hidden, teacher_head, entries, weights):
    roles, temperature, chunk, trains_head = statics

    def one(head_gradient, x):
        student, teacher, role, token, clip, weight = x
        logits = _both_logits(student, student_head, teacher, teacher_head)
        kl, gradient = divergence(*logits, role, roles=roles, temperature=temperature)
        scale = jnp.where(kl < clip, weight, 0.0)  # a clipped entry has no gradient
        gradient = (gradient * scale[..., None]).astype(student.dtype)  # [B, chunk, V]
        head = student_head.astype(student.dtype)
        state_gradient = jnp.einsum("bev,vd->bed", gradient, head, preferred_element_type=jnp.float32)
        if trains_head:
            head_gradient += jnp.einsum("bev,bed->vd", gradient, student, preferred_element_type=jnp.float32)
        loss = jnp.sum(weight * jnp.minimum(kl, clip))
        return head_gradient, (loss, _scores(*logits, kl, token), state_gradient.astype(student.dtype))

    parts = (
        student_hidden, teacher_hidden, jnp.maximum(entries.role, 0), entries.token, entries.clip, weights,
    )  # fmt: skip
    start = jnp.zeros(student_head.shape, jnp.float32) if trains_head else None
    head_gradient, (loss, scores, state_gradient) = jax.lax.scan(one, start, _split(parts, chunk))
    scores, state_gradient = _join((scores, state_gradient), entries.role.shape[1])
    if trains_head:
        head_gradient = head_gradient.astype(student_head.dtype)
    return (jnp.sum(loss), scores), (state_gradient, head_gradient)


def _weighted_loss_backward(statics, residuals, cotangents):
    state_gradient, head_gradient = residuals
    loss_cotangent, _ = cotangents
    scaled = lambda x: None if x is None else (loss_cotangent * x).astype(x.dtype)  # noqa: E731
    return scaled(state_gradient), scaled(head_gradient), None, None, None, None


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


def token_logps(hidden: Array, head: Array, token: Array, *, chunk: int) -> Array:
    """Log-probability of `token` [B, E] in the states `hidden` [B, E, D] under `head` [V, D], float32 [B, E]."""
    return _in_chunks(lambda h, t: _pick(log_softmax(_logits(h, head)), t), (hidden, token), chunk)


def _logits(hidden: Array, head: Array) -> Array:
    return jnp.einsum("bed,vd->bev", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _both_logits(
    student: Array, student_head: Array, teacher: Array, teacher_head: Array | None
) -> tuple[Array, Array]:
    if teacher_head is not None:
        return _logits(student, student_head), _logits(teacher, teacher_head)
    n = student.shape[1]
    logits = _logits(jnp.concatenate([student, teacher], 1), student_head)
    return logits[:, :n], logits[:, n:]


def _scores(student_logits: Array, teacher_logits: Array, kl: Array, token: Array) -> EntryScores:
    log_p, log_q = log_softmax(student_logits), log_softmax(teacher_logits)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
    return EntryScores(kl, _pick(log_p, token), _pick(log_q, token), entropy)


def _pick(log_probs: Array, token: Array) -> Array:
    return jnp.take_along_axis(log_probs, token[..., None], -1)[..., 0]


def _split(parts: Any, chunk: int) -> Any:
    """Arrays [B, E, ...] -> [n, B, chunk, ...], padded with zeros."""

    def split(x: Array) -> Array:
        b, e = x.shape[:2]
        size = min(chunk, e)
        n = -(-e // size)
        x = jnp.pad(x, [(0, 0), (0, n * size - e)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, n, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, parts)


def _join(results: Any, length: int) -> Any:
    """Arrays [n, B, chunk, ...] -> [B, length, ...]: the inverse of `_split`."""

    def join(x: Array) -> Array:
        n, b, size = x.shape[:3]
        return jnp.moveaxis(x, 0, 1).reshape(b, n * size, *x.shape[3:])[:, :length]

    return jax.tree.map(join, results)


def _in_chunks(function: Callable, parts: tuple[Array, ...], chunk: int) -> Any:
    """`function` of arrays [B, E, ...], applied to `chunk` entries of every row at a time."""
    _, results = jax.lax.scan(lambda _, x: (None, function(*x)), None, _split(parts, chunk))
    return _join(results, parts[0].shape[1])


def entry_shares(entries: Entries, *, count: int, reduction: str) -> Array:
    """How much each entry counts in its role's mean: [B, E, R], zero but for its own role's column.

    Args:
      count: roles in the table.
      reduction: "tokens" averages over the role's tokens; "sequences" over rollouts, each the mean of its tokens.
    """
    one_hot = (entries.role[..., None] == jnp.arange(count)).astype(jnp.float32)
    if reduction == "tokens":
        return one_hot
    return one_hot / jnp.maximum(jnp.sum(one_hot, 1, keepdims=True), 1.0)


def entry_weights(entries: Entries, shares: Array, *, roles: tuple[TeacherRole, ...], reduction: str) -> Array:
    """What each entry's divergence is multiplied with in the total loss: [B, E].

    Args:
      shares: [R], the sums of the shares over the global batch.
    """
    each = entry_shares(entries, count=len(roles), reduction=reduction)  # [B, E, R]
    weight = jnp.array([r.weight for r in roles], jnp.float32)
    return jnp.sum(each * weight / jnp.where(shares > 0, shares, 1.0), -1)


def role_stats(scores: EntryScores, entries: Entries, *, count: int, reduction: str) -> RoleStats:
    """Sums per role over all entries given; arguments as of `entry_shares`."""
    shares = entry_shares(entries, count=count, reduction=reduction)
    one_hot = shares > 0

    def total(x: Array, weights: Array) -> Array:  # unused slots may hold anything
        return jnp.sum(jnp.where(one_hot, weights * x[..., None], 0.0), (0, 1))

    ones = jnp.ones_like(scores.kl)
    return RoleStats(
        loss=total(jnp.minimum(scores.kl, entries.clip), shares),
        shares=total(ones, shares),
        tokens=total(ones, 1.0),
        clipped_tokens=total((scores.kl > entries.clip).astype(jnp.float32), 1.0),
        entropy=total(scores.entropy, 1.0),
    )


def role_losses(stats: RoleStats, shares: Array) -> Array:
    """Mean clipped divergence per role, [R]; `shares` [R] are those of the global batch. A role without tokens: 0."""
    return stats.loss / jnp.where(shares > 0, shares, 1.0)


def total_loss(stats: RoleStats, shares: Array, *, roles: tuple[TeacherRole, ...]) -> Array:
    """Equation 18: the weighted sum of the roles' means."""
    return jnp.dot(jnp.array([r.weight for r in roles], jnp.float32), role_losses(stats, shares))
