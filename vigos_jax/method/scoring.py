"""Student and teacher hidden states for a packed batch; the scores of its entries, and the loss over them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vigos_jax.method.losses import EntryScores, score_entries, token_logps, weighted_loss
from vigos_jax.method.roles import TeacherRole
from vigos_jax.models.attention import Causal
from vigos_jax.models.inputs import ScoreBatch
from vigos_jax.models.variables import Variables, shares_vision, student_variables, teacher_variables
from vigos_jax.models.vlm import VisionLanguageModel

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class EntryStates:
    """What the heads are applied to: states [B, E, D] and heads [V, D] of student and teachers."""

    student: Array
    student_head: Array
    teacher: Array
    teacher_head: Array | None  # None: it is the student's


def entry_states(
    model: VisionLanguageModel,
    base: Any,
    trained: Variables,
    batch: ScoreBatch,
    *,
    overlay: Variables | None = None,
    dropout_key: Array | None = None,
) -> EntryStates:
    """Runs the student on its sequences and all roles on their packed branches, and picks the entries' states.

    Gradients flow to `trained` only: the teachers and, where it is shared, the vision tower are cut off.

    Args:
      base: the frozen parameters, of every teacher and underneath the student.
      trained: `{"lora": ...}`, `{"params": ...}`, or `{}` for the base as its own student.
      overlay: what lies over the base for the teachers, from `teacher_overlay`; None is nothing: frozen teachers.
      dropout_key: applies the adapter's dropout to the student; None for none.
    """
    teacher, student = teacher_variables(base, overlay or {}), student_variables(base, trained)
    rest = {"deterministic": dropout_key is None}
    if dropout_key is not None:
        rest["rngs"] = {"dropout": dropout_key}
    teacher_images = batch.image_embeds
    if teacher_images is None:
        teacher_images = model.apply(teacher, batch.vision, method="encode_images")
    student_images = teacher_images
    if not shares_vision(trained):
        student_images = model.apply(student, batch.vision, method="encode_images", **rest)
    teacher_hidden, _ = model.apply(teacher, batch.teacher, teacher_images)  # [B, T', D]
    # The student's rows are plain sequences, right-padded.
    lengths = jnp.sum(batch.student.segment_ids > 0, -1)
    student_hidden, _ = model.apply(student, batch.student, student_images, mask=Causal(lengths), **rest)
    return EntryStates(
        student=_pick(student_hidden, batch.entries.student_at),
        student_head=model.apply(student, method="head"),
        teacher=_pick(teacher_hidden, batch.entries.teacher_at),
        # Adapters never sit on the head: only with parameters of its own does the student have another one.
        teacher_head=model.apply(teacher, method="head") if "params" in trained else None,
    )


def score_batch(
    model: VisionLanguageModel,
    base: Any,
    trained: Variables,
    batch: ScoreBatch,
    *,
    roles: tuple[TeacherRole, ...],
    chunk: int,
    temperature: float = 1.0,
    overlay: Variables | None = None,
) -> EntryScores:
    """Scores every entry; for a loss with a gradient see `loss_of_batch`.

    Args:
      chunk: entries per row whose logits exist at a time.
      temperature: of the divergence.
      base, trained, overlay: see `entry_states`.
    """
    s = entry_states(model, base, trained, batch, overlay=overlay)
    options = {"roles": roles, "temperature": temperature, "chunk": chunk}
    return score_entries(s.student, s.student_head, s.teacher, s.teacher_head, batch.entries, **options)


def loss_of_batch(
    model: VisionLanguageModel,
    base: Any,
    trained: Variables,
    batch: ScoreBatch,
    weights: Array,
    *,
    roles: tuple[TeacherRole, ...],
    chunk: int,
    temperature: float = 1.0,
    overlay: Variables | None = None,
    dropout_key: Array | None = None,
    probe: Array | float = 0.0,
) -> tuple[Array, EntryScores]:
    """The weighted sum of clipped divergences, and the scores of every entry (which carry no gradient).

    Args:
      weights: [B, E], from `losses.entry_weights`.
      probe: [B, E, D] zeros, added to the student's states: its gradient is the loss's at those states.
      others: as of `score_batch` and `entry_states`.
    """
    s = entry_states(model, base, trained, batch, overlay=overlay, dropout_key=dropout_key)
    return weighted_loss(
        s.student + probe,
        s.student_head,
        s.teacher,
        s.teacher_head,
        batch.entries,
        weights,
        roles=roles,
        temperature=temperature,
        chunk=chunk,
        trains_head="params" in trained,
    )


def teacher_logps(model: VisionLanguageModel, base: Any, batch: ScoreBatch, *, overlay: Variables, chunk: int) -> Array:
    """Log-probability of every entry's observed token under its role alone, [B, E]; no student runs."""
    teacher = teacher_variables(base, overlay)
    images = model.apply(teacher, batch.vision, method="encode_images")
    hidden, _ = model.apply(teacher, batch.teacher, images)
    states = _pick(hidden, batch.entries.teacher_at)
    return token_logps(states, model.apply(teacher, method="head"), batch.entries.token, chunk=chunk)


def _pick(hidden: Array, at: Array) -> Array:  # [B, T, D], [B, E] -> [B, E, D]
    return jnp.take_along_axis(hidden, at[:, :, None], axis=1)
