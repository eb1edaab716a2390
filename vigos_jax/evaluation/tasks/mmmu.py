"""MMMU (validation) and the two harder forms of MMMU-Pro: ten options, and the question inside the image."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vigos_jax.evaluation.tasks.task import ANSWER, IMAGES, QUESTION, Question, Task, ask_one, images_of

COLUMNS = (QUESTION, ANSWER, IMAGES)


def ask_in_picture(row: Mapping[str, Any], index: int) -> list[Question]:
    """The question and its options are in the image alone; the row's options serve to grade."""
    (question,) = ask_one(dict(row) | {"problem": "?"}, index)
    text = "The question and its options are shown in the image. Answer with the letter of the right option."
    return [dataclasses.replace(question, text=text, images=images_of(row))]


MMMU = Task("mmmu", "MMMU", "zli12321/MMMU", "test", 900, COLUMNS, ask_one)
MMMU_PRO = Task("mmmu_pro", "MMMU-Pro (10 options)", "zli12321/mmmu_pro_10options", "test", None, COLUMNS, ask_one)
MMMU_PRO_VISION = Task(
    "mmmu_pro_vision", "MMMU-Pro (vision)", "zli12321/mmmu-pro-vision", "test", None, (ANSWER, IMAGES), ask_in_picture
)
TASKS = (MMMU, MMMU_PRO, MMMU_PRO_VISION)
