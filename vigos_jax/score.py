"""Student and teacher hidden states for a packed batch, and the scores of its entries."""

from typing import Any

import jax
import jax.numpy as jnp

from vigos_jax.inputs import ScoreBatch
from vigos_jax.losses import EntryScores, score_entries, token_logps
from vigos_jax.models.qwen2_5_vl import Qwen2_5VL
from vigos_jax.models.variables import Variables, shares_vision, student_variables, teacher_variables
from vigos_jax.roles import TeacherRole

Array = jax.Array


def score_batch(
    model: Qwen2_5VL,
    base: Any,
    trained: Variables,
    batch: ScoreBatch,
    *,
    roles: tuple[TeacherRole, ...],
    chunk: int,
    temperature: float = 1.0,
    overlay: Variables | None = None,
    dropout_key: Array | None = None,
    probe: Array | float = 0.0,
) -> EntryScores:
    """Runs the student on its sequences and all roles on their packed branches, and scores every entry.

    Gradients flow to `trained` (and `probe`) only: the teachers and, where it is shared, the vision tower are cut off.

    Args:
      base: the frozen parameters, of every teacher and underneath the student.
      trained: `{"lora": ...}`, `{"params": ...}`, or `{}` for the base as its own student.
      chunk: entries per row whose logits exist at a time.
      temperature: of the divergence.
      overlay: what lies over the base for the teachers, from `teacher_overlay`; None is nothing: frozen teachers.
      dropout_key: applies the adapter's dropout to the student; None for none.
      probe: [B, E, D] zeros, added to the student's states: its gradient is the loss's at those states.
    """
    teacher = teacher_variables(base, overlay or {})
    student = student_variables(base, trained)
    rest = {} if dropout_key is None else {"rngs": {"dropout": dropout_key}}
    deterministic = dropout_key is None

    teacher_images = model.apply(teacher, batch.vision, method="encode_images")
    student_images = teacher_images
    if not shares_vision(trained):
        student_images = model.apply(
            student, batch.vision, deterministic=deterministic, method="encode_images", **rest
        )
    teacher_hidden, _ = model.apply(teacher, batch.teacher, teacher_images)  # [B, T', D]
    student_hidden, _ = model.apply(student, batch.student, student_images, deterministic=deterministic, **rest)

    pick = lambda x, at: jnp.take_along_axis(x, at[:, :, None], axis=1)  # noqa: E731  [B, T, D] -> [B, E, D]
    return score_entries(
        pick(student_hidden, batch.entries.student_at) + probe,
        pick(teacher_hidden, batch.entries.teacher_at),
        batch.entries,
        roles=roles,
        temperature=temperature,
        student_head=lambda h: model.apply(student, h, method="logits"),
        teacher_head=lambda h: model.apply(teacher, h, method="logits"),
        chunk=chunk,
    )


def teacher_logps(
    model: Qwen2_5VL, base: Any, batch: ScoreBatch, *, overlay: Variables, chunk: int
) -> Array:
    """Log-probability of every entry's observed token under its role alone, [B, E]; no student runs."""
    teacher = teacher_variables(base, overlay)
    images = model.apply(teacher, batch.vision, method="encode_images")
    hidden, _ = model.apply(teacher, batch.teacher, images)
    states = jnp.take_along_axis(hidden, batch.entries.teacher_at[:, :, None], axis=1)
    return token_logps(
        states, batch.entries.token, head=lambda h: model.apply(teacher, h, method="logits"), chunk=chunk
    )
