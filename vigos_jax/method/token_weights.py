"""Token weights within a role: a table of rules. A new rule is a row of `RULES` and a name in `roles.TOKEN_WEIGHTS`.

A rule computes a raw weight of at least 0 from the logits at each token. It is divided by its mean over the role's
tokens of the rollout, so that a rollout counts as much as under "uniform" and only the balance among its tokens
changes. A rollout whose raw weights are all 0 is weighted uniformly. Weights carry no gradient.

Letters: B batch, C tokens of a chunk, E supervised tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vigos_jax.method.batch import SupervisedStates, SupervisedTokens
from vigos_jax.method.divergences import log_softmax
from vigos_jax.method.losses import ObjectiveConfig, both_logits, heads_of, hidden_of, in_chunks, teacher_logits
from vigos_jax.method.roles import TeacherRole
from vigos_jax.models.shapes import Array, Float, Int

# In nats. Without it, weights would be rounding noise of log-probabilities where the image decides nothing.
LEAST = 0.01


class TokenLogits(NamedTuple):
    """A rule's inputs for a chunk of tokens.

    Attributes:
      student, teacher: float32 logits, at temperature 1.
      control: the teacher's logits without an image if the role has a control, else the same as `teacher`.
      token: the observed tokens.
    """

    student: Float[Array, "B C V"]
    teacher: Float[Array, "B C V"]
    control: Float[Array, "B C V"]
    token: Int[Array, "B C"]


def _uniform(at: TokenLogits, role: TeacherRole) -> Float[Array, "B C"]:
    return jnp.ones(at.token.shape)


def _entropy(at: TokenLogits, role: TeacherRole) -> Float[Array, "B C"]:
    """The student's entropy, in nats: where it could go several ways."""
    log_p = log_softmax(at.student)
    return -jnp.sum(jnp.exp(log_p) * log_p, -1)


def _image_dependence(at: TokenLogits, role: TeacherRole) -> Float[Array, "B C"]:
    """How much the token's log-probability under the teacher falls without the image, in nats, plus `LEAST`."""
    return jnp.maximum(_logp(at.teacher, at.token) - _logp(at.control, at.token), 0.0) + LEAST


def _teacher_top_k(at: TokenLogits, role: TeacherRole) -> Float[Array, "B C"]:
    """1 where fewer than k tokens are likelier under the teacher than the observed one, else 0."""
    own = jnp.take_along_axis(at.teacher, at.token[..., None], -1)
    return (jnp.sum(at.teacher > own, -1) < role.token_top_k).astype(jnp.float32)


def _logp(logits: Float[Array, "B C V"], token: Int[Array, "B C"]) -> Float[Array, "B C"]:
    return jnp.take_along_axis(log_softmax(logits), token[..., None], -1)[..., 0]  # NaN of a token beyond the heads


RULES: dict[str, Callable[[TokenLogits, TeacherRole], Float[Array, "B C"]]] = {
    "uniform": _uniform,
    "entropy": _entropy,
    "image_dependence": _image_dependence,
    "teacher_top_k": _teacher_top_k,
}


def token_weights(
    states: SupervisedStates, supervised: SupervisedTokens, objective: ObjectiveConfig
) -> Float[Array, "B E"]:
    """Every token's weight by its role's rule, normalised; 1 in unused slots.

    Where all rules are "uniform" nothing is computed; else it takes one more pass over the heads.
    """
    roles = objective.roles
    if all(role.token_weights == "uniform" for role in roles):
        return jnp.ones(supervised.role.shape)
    states = jax.lax.stop_gradient(states)
    controls = {name: t.hidden if t.control is None else t.control for name, t in states.teachers.items()}

    def raw(student, teachers, controls, role, token):
        logits = both_logits(student, teachers, role, states=states, roles=roles)
        without = teacher_logits(controls, role, heads=heads_of(states), roles=roles)
        at, out = TokenLogits(*logits, without, token), jnp.ones(token.shape)
        for r, of in enumerate(roles):
            if of.token_weights != "uniform":
                out = jnp.where(role == r, RULES[of.token_weights](at, of), out)
        return jnp.where(token < at.student.shape[-1], out, 0.0)  # ids beyond the smallest head are not tokens

    parts = states.student, hidden_of(states), controls, supervised.role, supervised.token
    weights = in_chunks(raw, parts, objective.chunk)
    one_hot = (supervised.role[..., None] == jnp.arange(len(roles))).astype(jnp.float32)  # [B, E, R]
    mean = jnp.sum(one_hot * weights[..., None], 1) / jnp.maximum(jnp.sum(one_hot, 1), 1.0)  # [B, R]
    mean = jnp.sum(one_hot * mean[:, None], -1)  # of each token's role, 0 in unused slots
    return jnp.where(mean > 0, weights / jnp.where(mean > 0, mean, 1.0), 1.0)
