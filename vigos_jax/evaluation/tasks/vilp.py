"""ViLP: one question, three images. The first fits what one expects, the other two contradict it.

ViLP-F keeps the fact that the question states first, ViLP-P drops that sentence.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vigos_jax.data.cleaning import clean_reference
from vigos_jax.evaluation.tasks.task import Graded, Question, Task, fault, mean, plain_text, rate

_FIRST_SENTENCE = re.compile(r"^[^.!?]*[.!?]+\s+(?=\S)")


def _asker(*, keeps_fact: bool):
    def ask(row: Mapping[str, Any], index: int) -> list[Question]:
        text = plain_text(row["question"])
        text = text if keeps_fact else _FIRST_SENTENCE.sub("", text, count=1)
        questions = []
        for n in (1, 2, 3):
            image, answer = row.get(f"image{n}"), clean_reference(row.get(f"answer{n}"))
            images = () if image is None else (image,)
            error = fault(text, answer, images)
            questions.append(Question(f"{index}-{n}", images, text, answer, part=f"image{n}", row=index, error=error))
        return questions

    return ask


def summarise(graded: Sequence[Graded]) -> dict[str, float | None]:
    """score: mean accuracy on images 2 and 3; prior: on image 1; and each position."""
    at = {n: rate([g for g in graded if g.question.part == f"image{n}"]) for n in (1, 2, 3)}
    return {"score": mean([at[2], at[3]]), "prior": at[1], **{f"image{n}": v for n, v in at.items()}}


COLUMNS = tuple((name,) for name in ("question", *(f"{k}{n}" for k in ("image", "answer") for n in (1, 2, 3))))
_SHARED = {"source": "ViLP/ViLP", "split": "train", "rows": 300, "columns": COLUMNS}
VILP_F = Task("vilp_f", "ViLP-F", ask=_asker(keeps_fact=True), summarise=summarise, samples=1, **_SHARED)
VILP_P = Task("vilp_p", "ViLP-P", ask=_asker(keeps_fact=False), summarise=summarise, samples=1, **_SHARED)
TASKS = (VILP_F, VILP_P)
