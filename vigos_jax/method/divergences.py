"""Divergences between a teacher q and the student p at one token, and their gradients; a new one is a row of the table.

A divergence is a sum over the vocabulary of terms t_v. With the slopes g_v = dt_v / d log p_v its gradient at the
student's logits is g - p sum(g), since log p = logits - logsumexp(logits): no second pass over the logits is needed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vigos_jax.models.shapes import AnyArray, Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Divergence:
    """One row of the table.

    Attributes:
      terms: (log_p, log_q, p, q, **parameters) -> (terms t_v, slopes g_v), all [..., V]; a parameter is [..., 1].
      slope_sum: sum_v g_v from the divergence's value, where it has a closed form that spares a sum over v.
      parameters: fields of `TeacherRole` that `terms` reads.
    """

    terms: Callable[..., tuple[Array, Array]]
    slope_sum: Callable[[Array], Array | float] | None = None
    parameters: tuple[str, ...] = ()


def _forward_kl(log_p: Array, log_q: Array, p: Array, q: Array) -> tuple[Array, Array]:
    """KL(q || p) = sum_v q_v (log q_v - log p_v)."""
    return q * (log_q - log_p), -q


def _reverse_kl(log_p: Array, log_q: Array, p: Array, q: Array) -> tuple[Array, Array]:
    """KL(p || q) = sum_v p_v (log p_v - log q_v)."""
    return p * (log_p - log_q), p * (log_p - log_q + 1)


def _jsd(log_p: Array, log_q: Array, p: Array, q: Array, *, beta: Array) -> tuple[Array, Array]:
    """The generalised Jensen-Shannon divergence: beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p."""
    log_m = jnp.logaddexp(jnp.log(beta) + log_q, jnp.log1p(-beta) + log_p)
    terms = beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)
    return terms, (1 - beta) * p * (log_p - log_m)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(_forward_kl, slope_sum=lambda value: -1.0),  # sum(-q)
    "reverse_kl": Divergence(_reverse_kl, slope_sum=lambda value: value + 1),  # sum(p (log p - log q)) + sum(p)
    "jsd": Divergence(_jsd, parameters=("beta",)),
}


def divergence(
    student_logits: Float[AnyArray, "*batch V"],
    teacher_logits: Float[AnyArray, "*batch V"],
    role: Int[AnyArray, "*batch"],
    *,
    roles: Sequence[Any],
    temperature: float,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch V"]]:
    """The divergence of each entry under its role, and its gradient at the student's logits.

    Args:
      role: index into `roles`.
      roles: the role table, of `TeacherRole`.
      temperature: divides both logits; the result is not multiplied by its square.
    """
    log_p = log_softmax(student_logits, temperature)
    log_q = log_softmax(teacher_logits, temperature)
    p, q = jnp.exp(log_p), jnp.exp(log_q)

    def of_role(values: list) -> Array:  # one value per role -> [*batch, 1]
        return jnp.array(values)[role][..., None]

    names = sorted({r.divergence for r in roles})
    table = [DIVERGENCES[name] for name in names]
    parts = [
        d.terms(log_p, log_q, p, q, **{field: of_role([getattr(r, field) for r in roles]) for field in d.parameters})
        for d in table
    ]
    terms, slopes = parts[0]
    for name, part in zip(names[1:], parts[1:], strict=True):
        is_named = of_role([r.divergence == name for r in roles])
        terms, slopes = (jnp.where(is_named, a, b) for a, b in zip(part, (terms, slopes), strict=True))
    is_clipped = any(r.clip and r.clip_per == "entry" for r in roles)
    if is_clipped:
        clip = of_role([r.clip if r.clip and r.clip_per == "entry" else jnp.inf for r in roles])
        slopes = jnp.where(terms < clip, slopes, 0.0)
        terms = jnp.minimum(terms, clip)
    value = jnp.sum(terms, -1)
    closed = [d.slope_sum for d in table if d.slope_sum is not None]
    if is_clipped or len(closed) < len(table):
        slope_sum = jnp.sum(slopes, -1)
    else:
        slope_sum = jnp.broadcast_to(closed[0](value), value.shape)
        for name, of_value in zip(names[1:], closed[1:], strict=True):
            is_named = of_role([r.divergence == name for r in roles])[..., 0]
            slope_sum = jnp.where(is_named, of_value(value), slope_sum)
    return value, (slopes - p * slope_sum[..., None]) / temperature


def log_softmax(logits: Float[AnyArray, "*batch V"], temperature: float = 1.0) -> Float[Array, "*batch V"]:
    """Log-probabilities in float32."""
    scaled: Array = jnp.asarray(logits, jnp.float32)
    if temperature != 1.0:
        scaled = scaled / temperature
    return scaled - jax.nn.logsumexp(scaled, -1, keepdims=True)
