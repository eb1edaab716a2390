"""The worlds of the embedded demo: images that contradict what one expects, and images that agree."""

from collections.abc import Mapping, Sequence
from typing import Any

from vigos_jax.evaluation.tasks.task import Graded, Question, Task, rate


def ask(row: Mapping[str, Any], index: int) -> list[Question]:
    """A row is one item of `demo.world`, with its setting."""
    return [
        Question(
            f"{row['setting']}-{index}", (row["image"],), row["question"], row["answer"], part=row["setting"], row=index
        )
    ]


def summarise(graded: Sequence[Graded]) -> dict[str, float | None]:
    """Score and Prior in percent: accuracy on images that contradict what one expects, and on those that agree."""
    return {
        "score": rate([g for g in graded if g.question.part == "conflict"]),
        "prior": rate([g for g in graded if g.question.part == "prior"]),
    }


COLUMNS = (("image",), ("question",), ("answer",), ("setting",))
TASKS = tuple(
    Task(name, title, name, "test", None, COLUMNS, ask, summarise)
    for name, title in (("demo", "Demo"), ("demo_reasoning", "Demo that takes reasoning"))
)
