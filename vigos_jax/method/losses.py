"""The loss: exact divergences over the full vocabulary, in chunks, so that [B, E, V] logits never exist.

Equations 18-21 of the ViGOS paper (arXiv 2606.19120). Each supervised token has one float32 divergence between its
teacher and the student (see `divergences`). The role's clip limits either that sum over the vocabulary or each of its
terms. The loss of a role, over all of its tokens in the global batch, is

    sum(weight * term * clipped divergence) / sum(term)

The denominator is the role's normalizer. A token's term is 1 to average over tokens (`reduction="tokens"`), or one over
the number of the role's tokens in the same rollout to average over rollouts (`reduction="sequences"`). Its weight
comes from `token_weights` and is 1 unless the role has a rule.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vigos_jax.method.batch import RoleStats, SupervisedStates, SupervisedTokens, TeacherStates, TokenScores
from vigos_jax.method.divergences import divergence, log_softmax
from vigos_jax.method.roles import TeacherRole
from vigos_jax.models.shapes import AnyArray, Array, Float, Int


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What the loss is, and how much of it is computed at a time; hashable.

    Attributes:
      roles: the role table.
      chunk: supervised tokens per row that are processed at a time. The logits of a chunk, the student's and those of
        each model that teaches (for a rule of weights also the control's), exist together, float32 [B, chunk, V] each.
      temperature: divides the logits of student and teacher; the divergence is not multiplied by its square.
      reduction: "tokens" averages over a role's tokens; "sequences" averages over rollouts, each counting as the mean
        of the role's tokens in it.
    """

    roles: tuple[TeacherRole, ...]
    chunk: int
    temperature: float = 1.0
    reduction: str = "tokens"

    @property
    def role_weights(self) -> Float[Array, "R"]:
        """lambda of every role."""
        return jnp.array([r.weight for r in self.roles], jnp.float32)


def score_tokens(states: SupervisedStates, supervised: SupervisedTokens, objective: ObjectiveConfig) -> TokenScores:
    """Scores [B, E] of all supervised tokens, in chunks of `objective.chunk` tokens per row to bound the memory."""

    def one(student, teachers, role, token):
        logits = both_logits(student, teachers, role, states=states, roles=objective.roles)
        value, _ = divergence(*logits, role, roles=objective.roles, temperature=objective.temperature)
        return _scores(*logits, value, token)

    parts = (states.student, hidden_of(states), jnp.maximum(supervised.role, 0), supervised.token)
    return in_chunks(one, parts, objective.chunk)


def weighted_loss(
    states: SupervisedStates,
    supervised: SupervisedTokens,
    weights: Float[AnyArray, "B E"],
    objective: ObjectiveConfig,
    *,
    trains_head: bool,
) -> tuple[Float[Array, ""], TokenScores]:
    """The total loss (equation 18) as sum(weight * clipped divergence), with a gradient written out by hand.

    It is differentiable in the student's states and, with `trains_head`, in its head; everything else, the teacher's
    states included, is a constant. The gradient is computed in the forward pass, while a chunk's logits are in memory,
    and the backward pass only scales it, so no logits are computed twice. Per chunk that costs one large product, or
    two if the head is trained, besides those that give the logits.

    Args:
      weights: from `loss_weights`; zero for unused slots.
      trains_head: whether the student's head needs a gradient; if not, it is a constant.

    Returns:
      The float32 loss and the scores of all tokens. The scores carry no gradient.
    """
    if not trains_head:
        states = states.replace(student_head=jax.lax.stop_gradient(states.student_head))
    return _weighted_loss(objective, trains_head, states, supervised, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted_loss(objective, trains_head, states, supervised, weights):
    scores = score_tokens(states, supervised, objective)
    return jnp.sum(weights * jnp.minimum(scores.divergence, supervised.clip)), scores


def _weighted_loss_forward(objective, trains_head, states, supervised, weights):
    def one(head_gradient, x):
        student, teachers, role, token, clip, weight = x
        logits = both_logits(student, teachers, role, states=states, roles=objective.roles)
        value, gradient = divergence(*logits, role, roles=objective.roles, temperature=objective.temperature)
        scale = jnp.where(value < clip, weight, 0.0)  # a clipped token has no gradient
        gradient = (gradient * scale[..., None]).astype(student.dtype)  # [B, chunk, V]
        head = states.student_head.astype(student.dtype)
        state_gradient = jnp.einsum("bev,vd->bed", gradient, head, preferred_element_type=jnp.float32)
        if trains_head:
            head_gradient += jnp.einsum("bev,bed->vd", gradient, student, preferred_element_type=jnp.float32)
        loss = jnp.sum(weight * jnp.minimum(value, clip))
        return head_gradient, (loss, _scores(*logits, value, token), state_gradient.astype(student.dtype))

    role = jnp.maximum(supervised.role, 0)
    parts = (states.student, hidden_of(states), role, supervised.token, supervised.clip, weights)
    start = jnp.zeros(states.student_head.shape, jnp.float32) if trains_head else None
    head_gradient, (loss, scores, state_gradient) = jax.lax.scan(one, start, _split(parts, objective.chunk))
    scores, state_gradient = _join((scores, state_gradient), supervised.role.shape[1])
    if head_gradient is not None:
        head_gradient = head_gradient.astype(states.student_head.dtype)
    return (jnp.sum(loss), scores), (state_gradient, head_gradient)


def _weighted_loss_backward(objective, trains_head, residuals, cotangents):
    state_gradient, head_gradient = residuals
    loss_cotangent, _ = cotangents
    no_gradient: Any = None

    def scaled(x: Any) -> Any:
        return no_gradient if x is None else (loss_cotangent * x).astype(x.dtype)

    states = SupervisedStates(scaled(state_gradient), scaled(head_gradient), no_gradient)
    return states, None, None


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


def token_logps(
    teachers: dict[str, TeacherStates], supervised: SupervisedTokens, objective: ObjectiveConfig
) -> Float[Array, "B E"]:
    """Float32 log-probability of every supervised token under its teacher, in chunks as `score_tokens`.

    Args:
      teachers: by `TeacherRole.model`, all with a head.
    """
    heads: dict[str, Any] = {name: teacher.head for name, teacher in teachers.items()}  # none of them None
    hidden = {name: teacher.hidden for name, teacher in teachers.items()}

    def one(hidden, role, token):
        return _pick(log_softmax(teacher_logits(hidden, role, heads=heads, roles=objective.roles)), token)

    return in_chunks(one, (hidden, jnp.maximum(supervised.role, 0), supervised.token), objective.chunk)


def logits_of(hidden: Float[AnyArray, "B E D"], head: Float[AnyArray, "V D"]) -> Float[Array, "B E V"]:
    """float32 logits of states under a head."""
    return jnp.einsum("bed,vd->bev", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def hidden_of(states: SupervisedStates) -> dict[str, Float[Array, "B E _"]]:
    """Each model's states of all tokens."""
    return {name: teacher.hidden for name, teacher in states.teachers.items()}


def both_logits(
    student: Float[AnyArray, "B E D"],
    teachers: Mapping[str, Float[AnyArray, "B E _"]],
    role: Int[AnyArray, "B E"],
    *,
    states: SupervisedStates,
    roles: tuple[TeacherRole, ...],
) -> tuple[Float[Array, "B E V"], Float[Array, "B E V"]]:
    """float32 logits of the student and of each token's teacher; where they share a head, by one product.

    Args:
      student, teachers: some tokens' states, as in `hidden_of`.
      states: whose heads are applied.
    """
    if [teacher.head for teacher in states.teachers.values()] == [None]:
        (teacher,), n = teachers.values(), student.shape[1]
        logits = logits_of(jnp.concatenate([student, teacher], 1), states.student_head)
        return logits[:, :n], logits[:, n:]
    own = logits_of(student, states.student_head)
    return own, teacher_logits(teachers, role, heads=heads_of(states), roles=roles)


def heads_of(states: SupervisedStates) -> dict[str, Float[Array, "V _"]]:
    """Each model's output head."""
    student = states.student_head
    return {name: student if teacher.head is None else teacher.head for name, teacher in states.teachers.items()}


def teacher_logits(
    teachers: Mapping[str, Float[AnyArray, "B E _"]],
    role: Int[AnyArray, "B E"],
    *,
    heads: Mapping[str, Float[AnyArray, "V _"]],
    roles: tuple[TeacherRole, ...],
) -> Float[Array, "B E V"]:
    """float32 logits of each token's teacher, by the model that its role names.

    Args:
      teachers: some tokens' states, as in `hidden_of`.
    """
    out = None
    for name, hidden in teachers.items():
        logits = logits_of(hidden, heads[name])
        is_its = jnp.array([r.model == name for r in roles])[role]
        out = logits if out is None else jnp.where(is_its[..., None], logits, out)
    assert out is not None  # a table has a role, and a role a model
    return out


def _scores(
    student_logits: Float[AnyArray, "B E V"],
    teacher_logits: Float[AnyArray, "B E V"],
    value: Float[Array, "B E"],
    token: Int[AnyArray, "B E"],
) -> TokenScores:
    log_p, log_q = log_softmax(student_logits), log_softmax(teacher_logits)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
    return TokenScores(value, _pick(log_p, token), _pick(log_q, token), entropy, jnp.ones_like(value))


def _pick(log_probs: Float[AnyArray, "B E V"], token: Int[AnyArray, "B E"]) -> Float[Array, "B E"]:
    return jnp.take_along_axis(log_probs, token[..., None], -1)[..., 0]


def _split(parts: Any, chunk: int) -> Any:
    """Arrays [B, E, ...] -> [n, B, chunk, ...], padded with zeros."""

    def split(x):
        b, e = x.shape[:2]
        size = min(chunk, e)
        n = -(-e // size)
        x = jnp.pad(x, [(0, 0), (0, n * size - e)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, n, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, parts)


def _join(results: Any, length: int) -> Any:
    """Arrays [n, B, chunk, ...] -> [B, length, ...]: the inverse of `_split`."""

    def join(x):
        n, b, size = x.shape[:3]
        return jnp.moveaxis(x, 0, 1).reshape(b, n * size, *x.shape[3:])[:, :length]

    return jax.tree.map(join, results)


def in_chunks(function: Callable, parts: tuple[Any, ...], chunk: int) -> Any:
    """`function` of trees of arrays [B, E, ...], applied to `chunk` tokens of every row at a time."""
    _, results = jax.lax.scan(lambda _, x: (None, function(*x)), None, _split(parts, chunk))
    return _join(results, jax.tree.leaves(parts)[0].shape[1])


def normalizer_terms(supervised: SupervisedTokens, objective: ObjectiveConfig) -> Float[Array, "B E R"]:
    """What each token adds to its role's normalizer: float32, zero but for its own role's column."""
    one_hot = (supervised.role[..., None] == jnp.arange(len(objective.roles))).astype(jnp.float32)
    if objective.reduction == "tokens":
        return one_hot
    return one_hot / jnp.maximum(jnp.sum(one_hot, 1, keepdims=True), 1.0)


def loss_weights(
    supervised: SupervisedTokens, normalizers: Float[AnyArray, "R"], objective: ObjectiveConfig
) -> Float[Array, "B E"]:
    """The factor of each token's clipped divergence in the total loss: its role's weight * term / normalizer.

    Args:
      normalizers: per role, the sum of `normalizer_terms` over the global batch.

    Returns:
      float32 [B, E], 0 for unused slots.
    """
    terms = normalizer_terms(supervised, objective)  # [B, E, R]
    return jnp.sum(terms * objective.role_weights / jnp.where(normalizers > 0, normalizers, 1.0), -1)


def role_stats(scores: TokenScores, supervised: SupervisedTokens, objective: ObjectiveConfig) -> RoleStats:
    """Sums per role over all tokens given."""
    terms = normalizer_terms(supervised, objective)
    one_hot = terms > 0

    def total(x, weights):  # unused slots may hold anything
        return jnp.sum(jnp.where(one_hot, weights * x[..., None], 0.0), (0, 1))

    ones = jnp.ones_like(scores.divergence)
    return RoleStats(
        loss=total(scores.weight * jnp.minimum(scores.divergence, supervised.clip), terms),
        normalizer=total(ones, terms),
        tokens=total(ones, 1.0),
        clipped_tokens=total((scores.divergence > supervised.clip).astype(jnp.float32), 1.0),
        entropy=total(scores.entropy, 1.0),
        squares=total(jnp.square(scores.weight), 1.0),
    )


def role_losses(stats: RoleStats, normalizers: Float[AnyArray, "R"]) -> Float[AnyArray, "R"]:
    """Mean clipped divergence per role; `normalizers` are the global batch's. A role without tokens: 0."""
    return stats.loss / jnp.where(normalizers > 0, normalizers, 1.0)


def total_loss(stats: RoleStats, normalizers: Float[AnyArray, "R"], objective: ObjectiveConfig) -> Float[Array, ""]:
    """Equation 18: the weighted sum of the roles' means."""
    return jnp.dot(objective.role_weights, role_losses(stats, normalizers))
