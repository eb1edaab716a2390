"""The segment-masked divergence over the full vocabulary, without ever holding [T, V] logits.

Equations 18-21 of the ViGOS paper. For every supervised entry, with teacher q and student p over the vocabulary,

    forward_kl  KL(q || p) = sum_v q_v (log q_v - log p_v)
    reverse_kl  KL(p || q) = sum_v p_v (log p_v - log q_v)
    jsd         beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p

in float32, clipped per token after the sum over v (or every term of it), averaged over each role's own tokens of the
global batch. A role's mean is `sum(share * divergence) / sum(share)`: a share is 1 to average over tokens, and
one over the number of the role's tokens in the rollout to average over rollouts.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from vigos_jax.inputs import Entries
from vigos_jax.roles import TeacherRole

Array = jax.Array
REDUCTIONS = ("tokens", "sequences")


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


def divergence(
    student_logits: Array, teacher_logits: Array, role: Array, *, roles: tuple[TeacherRole, ...], temperature: float
) -> Array:
    """The divergence of each entry under its role: logits [..., V], role int [...] -> float32 [...].

    Args:
      temperature: divides both logits; the result is not multiplied by its square.
    """
    log_p = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    log_q = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)

    def of_role(values: list) -> Array:  # one value per role -> [..., 1]
        return jnp.array(values)[role][..., None]

    kinds = {r.divergence for r in roles}
    terms = None
    if kinds & {"forward_kl", "reverse_kl"}:
        # One formula for both directions: KL(a || b).
        if kinds >= {"forward_kl", "reverse_kl"}:
            is_reverse = of_role([r.divergence == "reverse_kl" for r in roles])
            log_a, log_b = jnp.where(is_reverse, log_p, log_q), jnp.where(is_reverse, log_q, log_p)
        else:
            log_a, log_b = (log_q, log_p) if "forward_kl" in kinds else (log_p, log_q)
        terms = jnp.exp(log_a) * (log_a - log_b)
    if "jsd" in kinds:
        beta = of_role([r.beta for r in roles])
        log_m = jnp.logaddexp(jnp.log(beta) + log_q, jnp.log1p(-beta) + log_p)
        mixed = beta * jnp.exp(log_q) * (log_q - log_m) + (1 - beta) * jnp.exp(log_p) * (log_p - log_m)
        terms = mixed if terms is None else jnp.where(of_role([r.divergence == "jsd" for r in roles]), mixed, terms)
    if any(r.clip and r.clip_per == "entry" for r in roles):
        terms = jnp.minimum(terms, of_role([r.clip if r.clip and r.clip_per == "entry" else jnp.inf for r in roles]))
    return jnp.sum(terms, -1)


def score_entries(
    student_hidden: Array,
    teacher_hidden: Array,
    entries: Entries,
    *,
    roles: tuple[TeacherRole, ...],
    temperature: float,
    student_head: Callable[[Array], Array],
    teacher_head: Callable[[Array], Array],
    chunk: int,
) -> EntryScores:
    """Applies both heads and the divergence to `chunk` entries of every row at a time.

    The backward pass recomputes each chunk's logits, so at no time do more than [B, chunk, V] of them exist.

    Args:
      student_hidden, teacher_hidden: [B, E, D], the states of each entry.
      temperature: of the divergence.
      student_head, teacher_head: hidden [..., D] to logits [..., V].
      chunk: entries per row and pass; E need not be a multiple of it.
    """

    def one(student: Array, teacher: Array, role: Array, token: Array) -> EntryScores:
        student_logits, teacher_logits = student_head(student), teacher_head(teacher)
        kl = divergence(student_logits, teacher_logits, role, roles=roles, temperature=temperature)
        log_p, log_q = (jax.nn.log_softmax(jax.lax.stop_gradient(x)) for x in (student_logits, teacher_logits))
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
        return EntryScores(kl, _pick(log_p, token), _pick(log_q, token), entropy)

    parts = (student_hidden, teacher_hidden, jnp.maximum(entries.role, 0), entries.token)
    return _in_chunks(one, parts, chunk)


def token_logps(hidden: Array, token: Array, *, head: Callable[[Array], Array], chunk: int) -> Array:
    """Log-probability of `token` [B, E] in the states `hidden` [B, E, D], float32 [B, E]."""
    return _in_chunks(lambda h, t: _pick(jax.nn.log_softmax(head(h).astype(jnp.float32)), t), (hidden, token), chunk)


def _pick(log_probs: Array, token: Array) -> Array:
    return jnp.take_along_axis(log_probs, token[..., None], -1)[..., 0]


def _in_chunks(function: Callable, parts: tuple[Array, ...], chunk: int):
    """`function` of arrays [B, E, ...], applied to `chunk` entries of every row at a time; the results are [B, E]."""
    b, e = parts[0].shape[:2]
    chunk = min(chunk, e)
    n = -(-e // chunk)

    def split(x: Array) -> Array:  # [B, E, ...] -> [n, B, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, n * chunk - e)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, n, chunk, *x.shape[2:]), 1, 0)

    one = jax.checkpoint(function)
    _, results = jax.lax.scan(lambda _, x: (None, one(*x)), None, jax.tree.map(split, parts))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, n * chunk)[:, :e], results)


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
