"""Student and teacher hidden states for a packed batch, and the scores of its entries."""

from typing import Any

import jax
import jax.numpy as jnp

from vigos_jax.inputs import ScoreBatch
from vigos_jax.losses import EntryScores, score_entries
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
    dropout_key: Array | None = None,
) -> EntryScores:
    """Runs the student on its sequences and all frozen roles on their packed branches, and scores every entry.

    Gradients flow to `trained` only: the teachers and, where it is shared, the vision tower are cut off.

    Args:
      base: the frozen parameters, of every teacher and underneath the student.
      trained: `{"lora": ...}`, `{"params": ...}`, or `{}` for the base as its own student.
      chunk: entries per row whose logits exist at a time.
      dropout_key: applies the adapter's dropout to the student; None for none.
    """
    teacher = teacher_variables(base)
    student = student_variables(base, trained)
    rest = {} if dropout_key is None else {"rngs": {"dropout": dropout_key}}
    deterministic = dropout_key is None

    teacher_images = jax.lax.stop_gradient(model.apply(teacher, batch.vision, method="encode_images"))
    student_images = teacher_images
    if not shares_vision(trained):
        student_images = model.apply(
            student, batch.vision, deterministic=deterministic, method="encode_images", **rest
        )
    teacher_hidden, _ = model.apply(teacher, batch.teacher, teacher_images)  # [B, T', D]
    student_hidden, _ = model.apply(student, batch.student, student_images, deterministic=deterministic, **rest)

    pick = lambda x, at: jnp.take_along_axis(x, at[:, :, None], axis=1)  # noqa: E731  [B, T, D] -> [B, E, D]
    return score_entries(
        pick(student_hidden, batch.entries.student_at),
        jax.lax.stop_gradient(pick(teacher_hidden, batch.entries.teacher_at)),
        batch.entries,
        roles=roles,
        student_head=lambda h: model.apply(student, h, method="logits"),
        teacher_head=lambda h: jax.lax.stop_gradient(model.apply(teacher, h, method="logits")),
        chunk=chunk,
    )
