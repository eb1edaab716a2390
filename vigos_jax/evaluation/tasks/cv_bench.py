"""CV-Bench: counting, relations, depth and distance. The official number averages sources, not questions."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vigos_jax.evaluation.tasks.task import ANSWER, IMAGES, Graded, Question, Task, ask_one, mean, rate

SOURCES = ("ADE20K", "COCO", "Omni3D")


def ask(row: Mapping[str, Any], index: int) -> list[Question]:
    """The row's one question, grouped by its kind; `part` is the data set it was taken from."""
    (question,) = ask_one(row, index)
    return [dataclasses.replace(question, group=str(row.get("task") or ""), part=str(row.get("source")))]


def summarise(graded: Sequence[Graded]) -> dict[str, float | None]:
    """micro: over questions. 2d: mean of ADE20K and COCO; 3d: Omni3D; official: mean of the two.

    Only micro if a source is missing, as in a subset.
    """
    parts = {s: [g for g in graded if g.question.part == s] for s in SOURCES}
    if not all(parts.values()):
        return {"micro": rate(graded)}
    by_source = {s: rate(part) for s, part in parts.items()}
    two_d = mean([by_source["ADE20K"], by_source["COCO"]])
    three_d = by_source["Omni3D"]
    return {"micro": rate(graded), "2d": two_d, "3d": three_d, "official": mean([two_d, three_d])}


TASK = Task(
    "cv_bench", "CV-Bench", "nyu-visionx/CV-Bench", "test", 2638,
    (("question",), ANSWER, IMAGES, ("choices",), ("source",)), ask, summarise,
)  # fmt: skip
