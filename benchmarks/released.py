"""The released design's shape, in this code base: what packing, one vision pass and chunked heads are measured against.

Every role is a full sequence of its own, image, prompt and whole completion, for every row whether it is used or not;
each pass encodes the images again; logits exist for every completion token.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vigos_jax.method.batch import ScoreBatch
from vigos_jax.method.packing import Buckets, pack_scores
from vigos_jax.method.rows import Rollout, Row
from vigos_jax.models.variables import student_variables, teacher_variables
from vigos_jax.models.vlm import VisionLanguageModel

Array = jax.Array


def pack_each(rows: Sequence[Row], rollouts: Sequence[Rollout], *, config, buckets: Buckets) -> list[ScoreBatch]:
    """A batch for the student and for every role, each with its turn where the student's would be.

    The roles' sequences are padded to one length, that of the longest.
    """
    turns = range(1 + len(rows[0].teachers))
    longest = max(len(t.ids) + len(r.ids) for row, r in zip(rows, rollouts, strict=True) for t in row.teachers)
    padded = dataclasses.replace(buckets, sequence=(buckets.fit("sequence", longest),))
    as_student = lambda row, i: dataclasses.replace(row, student=(row.student, *row.teachers)[i], teachers=())  # noqa: E731
    return [
        pack_scores(
            [as_student(row, i) for row in rows], rollouts, roles=(), config=config, buckets=padded if i else buckets
        )
        for i in turns
    ]


def completion_logits(
    model: VisionLanguageModel, variables: Any, batch: ScoreBatch, starts: Array, length: int
) -> Array:
    """[B, C, V] logits that predict the completion, after a vision pass and a full sequence of their own.

    Args:
      starts: [B], where the completion starts in each sequence.
    """
    images = model.apply(variables, batch.vision, method="encode_images")
    hidden, _ = model.apply(variables, batch.student, images)
    at = starts[:, None] - 1 + jnp.arange(length)
    states = jnp.take_along_axis(hidden, at[:, :, None], 1)
    return model.apply(variables, states, method="logits")


def loss(
    model: VisionLanguageModel,
    base: Any,
    trained: Any,
    batches: Sequence[ScoreBatch],
    starts: Sequence[Array],
    masks: Array,
    length: int,
    clip: float,
) -> Array:
    """The paper's objective by four full passes. masks: bool [3, B, C], the tokens of each role."""
    student, teacher = student_variables(base, trained), teacher_variables(base, {})
    log_p = jax.nn.log_softmax(completion_logits(model, student, batches[0], starts[0], length))
    total = 0.0
    for r, (batch, start) in enumerate(zip(batches[1:], starts[1:], strict=True)):
        log_q = jax.nn.log_softmax(completion_logits(model, teacher, batch, start, length))
        a, b = (log_p, log_q) if r == 2 else (log_q, log_p)
        kl = jnp.minimum(jnp.sum(jnp.exp(a) * (a - b), -1), clip)
        weight = 2.0 if r == 2 else 1.0
        total += weight * jnp.sum(jnp.where(masks[r], kl, 0.0)) / jnp.maximum(jnp.sum(masks[r]), 1)
    return total


def teacher_pass(
    model: VisionLanguageModel, base: Any, batches: Sequence[ScoreBatch], starts: Sequence[Array], length: int
) -> list[Array]:
    """Logits of all roles, by three vision passes and three full sequences."""
    variables = teacher_variables(base, {})
    return [
        completion_logits(model, variables, batch, start, length)
        for batch, start in zip(batches[1:], starts[1:], strict=True)
    ]
