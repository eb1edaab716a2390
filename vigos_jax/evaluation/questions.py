"""Where a task's rows come from: a hub data set, a folder of parquet of the same schema, or the demo's world."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from vigos_jax.data.tables import DATASET_ID, open_table
from vigos_jax.demo.world import WORLDS
from vigos_jax.demo.world import item as item_at
from vigos_jax.errors import InputError
from vigos_jax.evaluation.tasks.task import Question, Task
from vigos_jax.runtime import hub


@dataclasses.dataclass(frozen=True)
class TaskRows:
    """Rows with random access.

    Attributes:
      name: where they come from.
      image_roots: folders that paths of images may lead into.
    """

    name: str
    rows: Sequence[Any]
    columns: tuple[str, ...]
    image_roots: tuple[str, ...]


class _DemoRows(Sequence):
    """`count` items of each kind; they are disjoint from the training stream."""

    def __init__(self, world: str, *, count: int, seed: int):
        self._world, self._count, self._seed = world, count, seed

    def __len__(self) -> int:
        return 2 * self._count

    def __getitem__(self, index: Any) -> Any:
        setting = "conflict" if index < self._count else "prior"
        item = item_at(self._seed, index % self._count, setting=setting, world=self._world)
        return {"image": item.pil_image, "question": item.question, "answer": item.answer, "setting": setting}


def open_rows(task: Task, source: str, *, demo_questions: int, seed: int) -> TaskRows:
    """Opens a task's source and checks its columns.

    Args:
      source: hub data set or folder, "" for the task's own.

    Raises:
      InputError: it cannot be read, or lacks columns (those it has are named).
    """
    source = source or task.source
    if source in WORLDS:
        rows = _DemoRows(source, count=demo_questions, seed=seed)
        out = TaskRows(source, rows, tuple(rows[0]), ())
    elif task.split == "data.json":
        out = _open_json(source)
    else:
        table = open_table(source, split=task.split)
        out = TaskRows(source, table, tuple(table.column_names), table.image_roots)
    task.check_columns(out.columns, where=out.name)
    return out


def _open_json(source: str) -> TaskRows:
    """A folder with data.json, a list of objects, and the images they speak of."""
    folder = pathlib.Path(source).expanduser()
    if not folder.is_dir():
        choices = "a folder with data.json, a hub data set (owner/name)"
        if not DATASET_ID.fullmatch(source):
            raise InputError(f"{source!r} is not a folder with data.json; choices: {choices}")
        import huggingface_hub

        try:
            folder = pathlib.Path(huggingface_hub.snapshot_download(source, repo_type="dataset"))
        except Exception as e:
            raise InputError(
                f"{source!r} is not a folder and cannot be fetched from the hub: {hub.reason(e)}; choices: {choices}"
            ) from e
    try:
        rows = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"cannot read {folder / 'data.json'}: {e}; it must hold a list of objects") from e
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{folder / 'data.json'} must hold a list of objects")
    columns = set.intersection(*(set(row) for row in rows))
    return TaskRows(source, rows, tuple(sorted(columns)), (str(folder),))


def questions_of(task: Task, rows: TaskRows, *, limit: int) -> list[Question]:
    """The questions of `limit` rows (0: of all rows), spread evenly over the source, in order.

    A repeated id gets its row number appended. Answers given as an option's index count from 0; if one of them is out
    of range, the source counts differently, and all questions with such answers become unusable.
    """
    size = len(rows.rows)
    count = min(limit, size) if limit else size
    questions, seen = [], set()
    for i in range(count):
        number = i * size // count
        for question in task.ask(rows.rows[number], number):
            if question.id in seen:
                question = dataclasses.replace(question, id=f"{question.id}#{number}")
            seen.add(question.id)
            questions.append(question)
    if any(q.is_index and q.error == "answer_not_an_option" for q in questions):
        unclear = "unclear_answer_index"
        questions = [dataclasses.replace(q, error=q.error or unclear) if q.is_index else q for q in questions]
    return questions
