"""Student and teacher hidden states of a packed batch, and the scores of its supervised tokens."""

from typing import Any

import jax.numpy as jnp

from vigos_jax.method.batch import ScoreBatch
from vigos_jax.method.losses import ObjectiveConfig, SupervisedStates, TokenScores, score_tokens, token_logps
from vigos_jax.method.token_weights import token_weights
from vigos_jax.models.shapes import AnyArray, Array, Float, Int, Key
from vigos_jax.models.variables import Variables, shares_vision, student_variables, teacher_variables
from vigos_jax.models.vlm import VisionLanguageModel


def supervised_states(
    model: VisionLanguageModel,
    base: Any,
    trained: Variables,
    batch: ScoreBatch,
    *,
    teacher_params: Variables | None = None,
    dropout_key: Key[AnyArray, ""] | None = None,
) -> SupervisedStates:
    """The states behind every supervised token: the student runs on its sequences, all roles on their packed branches.

    Gradients flow to `trained` only: the teachers and, where it is shared, the vision tower are cut off.

    Args:
      base: the frozen parameters, of every teacher and underneath the student.
      trained: `{"lora": ...}`, `{"params": ...}`, or `{}` for the base as its own student.
      teacher_params: what replaces or adapts the base for the teachers, from `teacher_params_of`; None: nothing does.
      dropout_key: applies the adapter's dropout to the student; None for none.
    """
    apply: Any = model.apply  # which returns what its method does
    teacher, student = teacher_variables(base, teacher_params or {}), student_variables(base, trained)
    rest: dict[str, Any] = {"deterministic": dropout_key is None}
    if dropout_key is not None:
        rest["rngs"] = {"dropout": dropout_key}
    images = batch.image_embeds
    if images is None and (batch.teacher is not None or shares_vision(trained)):
        images = apply(teacher, batch.vision, method="encode_images")
    teacher_hidden = _teacher_hidden(apply, teacher, batch, images)  # [B, T', D]
    student_images = images
    if not shares_vision(trained):
        student_images = apply(student, batch.vision, method="encode_images", **rest)
    student_hidden, _ = apply(student, batch.student, student_images, **rest)
    return SupervisedStates(
        student=_pick(student_hidden, batch.supervised.student_at),
        student_head=apply(student, method="head"),
        teacher=_pick(teacher_hidden, batch.supervised.teacher_at),
        # Adapters never sit on the head: only with parameters of its own does the student have another one.
        teacher_head=apply(teacher, method="head") if "params" in trained else None,
        control=None if (at := batch.supervised.control_at) is None else _pick(teacher_hidden, at),
    )


def score_batch(
    model: VisionLanguageModel,
    base: Any,
    trained: Variables,
    batch: ScoreBatch,
    objective: ObjectiveConfig,
    *,
    teacher_params: Variables | None = None,
) -> TokenScores:
    """Scores every supervised token, without a gradient. base, trained, teacher_params: see `supervised_states`."""
    states = supervised_states(model, base, trained, batch, teacher_params=teacher_params)
    scores = score_tokens(states, batch.supervised, objective)
    return scores.replace(weight=token_weights(states, batch.supervised, objective))


def teacher_logps(
    model: VisionLanguageModel, base: Any, batch: ScoreBatch, *, teacher_params: Variables, chunk: int
) -> Float[Array, "B E"]:
    """Log-probability of every supervised token under its role alone; no student runs."""
    apply: Any = model.apply
    teacher = teacher_variables(base, teacher_params)
    images = None if batch.teacher is None else apply(teacher, batch.vision, method="encode_images")
    hidden = _teacher_hidden(apply, teacher, batch, images)
    states = _pick(hidden, batch.supervised.teacher_at)
    return token_logps(states, apply(teacher, method="head"), batch.supervised.token, chunk=chunk)


def _teacher_hidden(
    apply: Any, teacher: Variables, batch: ScoreBatch, images: Float[AnyArray, "B M W"] | None
) -> Float[Array, "B T D"]:
    """The states of all packed sequences, one behind the other: what `teacher_at` counts.

    Args:
      images: visual tokens of the rows' own images, for `batch.teacher`.
    """
    hidden = [] if batch.teacher is None else [apply(teacher, batch.teacher, images)[0]]
    for view in batch.views:
        if view.vision is None:
            seen = jnp.zeros((view.text.ids.shape[0], 0, 0))  # no visual token at all
        else:
            seen = apply(teacher, view.vision, method="encode_images")
        hidden.append(apply(teacher, view.text, seen)[0])
    return hidden[0] if len(hidden) == 1 else jnp.concatenate(hidden, axis=1)


def _pick(hidden: Float[AnyArray, "B T D"], at: Int[AnyArray, "B E"]) -> Float[Array, "B E D"]:
    return jnp.take_along_axis(hidden, at[:, :, None], axis=1)
