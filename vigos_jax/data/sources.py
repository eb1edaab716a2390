"""Where rows come from: a hub data set, parquet or jsonl, with random access and images left undecoded.

A row has `problem`, `answer` and `images` (or `image`; one image or a list), perhaps a `problem_id` (else `id`, else
its number), and the columns of `config.data.fields`. `options` and `wrong_answers` are handed on where a row has them.
"""

import hashlib
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vigos_jax.errors import InputError
from vigos_jax.grading.answer_text import mentions
from vigos_jax.runtime import hub

DATASET_ID = re.compile(r"([\w.-]+/)?[\w.-]+")  # of a data set on the hub; some have no owner
SOURCE_CHOICES = "a .jsonl file, a .parquet file, a folder of .parquet files, a hub data set (owner/name)"


class Source(Sequence):
    """Rows with random access, and what a source may declare about itself; the defaults hold for any data.

    Attributes:
      image_roots: folders that paths of images may lead into, see `read_image`.
      has_own_evaluation: whether a run on it ends with the demo's evaluation, results.json.
    """

    image_roots: tuple[str, ...] = ()
    has_own_evaluation = False

    def probes(self, *, count: int, seed: int) -> "Source":
        """The source whose first `count` rows a run answers again and again: its own."""
        return self

    def for_diagnosis(self, *, count: int, seed: int) -> "Source":
        """The source whose first `count` rows a diagnosis samples rollouts for: its own."""
        return self

    def is_leaky(self, index: int, description: str, answer: str | None) -> bool:
        """Whether the description contains the final answer, which is right where the answer can be seen."""
        return bool(answer and mentions(description, answer))


class TableSource(Source):
    """Rows of a `datasets.Dataset` (memory-mapped), images left undecoded; `image_roots` as of `read_image`."""

    def __init__(self, table, *, name: str, image_roots: Sequence[str], fields: Sequence[str] = ()):
        images = _check_columns(table.column_names, name, fields)
        wanted = ("problem", "answer", images, "problem_id", "id", "options", "wrong_answers", *fields)
        self._table = table.select_columns([c for c in wanted if c in table.column_names])
        self.image_roots = tuple(image_roots)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        row = self._table[int(index)]
        return row | raw_row(row, int(index))


class JsonlSource(Source):
    """Rows of a .jsonl file, read when asked for; other fields are handed on as they are.

    Memory holds only the lines' places. Every read opens the file, so threads and processes can share it.
    """

    def __init__(self, path: str | pathlib.Path, *, fields: Sequence[str] = ()):
        self.path = str(pathlib.Path(path).resolve())
        self.image_roots = (str(pathlib.Path(self.path).parent),)
        starts, numbers, position = [], [], 0
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        starts.append(position)
                        numbers.append(number)
                    position += len(line)
        except OSError as e:
            raise InputError(f"cannot read {self.path}: {e.strerror}") from e
        self._starts = np.asarray(starts, np.int64)  # byte offset of each line that is not blank
        self._numbers = np.asarray(numbers, np.int64)
        first = next((row for row in map(self._parse, range(len(self))) if row is not None), None)
        if first is None:
            raise InputError(f"{self.path} has no usable row: no line is a JSON object")
        _check_columns(list(first), self.path, fields)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        raw = self._parse(int(index))
        if raw is None:
            return raw_row({}, int(index)) | {"bad_reason": "bad_json"}
        return raw | raw_row(raw, int(index)) | {"bad_reason": None}

    def line(self, index: int) -> int:
        """The row's line in the file, counted from 1."""
        return int(self._numbers[index])

    def _parse(self, index: int) -> dict[str, Any] | None:
        with open(self.path, "rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None


def load_source(data) -> TableSource | JsonlSource:
    """Opens `data.source` of `config.data`: one of SOURCE_CHOICES; InputError if it cannot be used.

    `data.split` is the split of a hub data set or folder; a single file is taken whole, whatever it says.
    Parquet and hub data sets pass through the `datasets` library's cache on disk.
    """
    name = data.source
    path = pathlib.Path(name).expanduser()
    if name and path.suffix == ".jsonl" and path.is_file():
        return JsonlSource(path, fields=data.fields)
    table, roots = open_table(name, split=data.split)
    return TableSource(table, name=name, image_roots=roots, fields=data.fields)


def open_table(name: str, *, split: str) -> tuple[Any, tuple[str, ...]]:
    """(a `datasets.Dataset` with images left undecoded, its image roots) of parquet or a hub data set.

    Raises:
      InputError: there is no such thing, it cannot be read, or it has no rows.
    """
    path = pathlib.Path(name).expanduser()
    if name and path.suffix == ".parquet" and path.is_file():
        file = path.resolve()
        options = {"split": "train", "data_files": {"train": [str(file)]}}
        return _load_table(name, "parquet", **options), (str(file.parent),)
    if name and path.is_dir() and next(path.rglob("*.parquet"), None):
        folder = str(path.resolve())
        return _load_table(name, "parquet", split=split, data_dir=folder), (folder,)
    if path.exists() or path.suffix in (".jsonl", ".parquet") or not DATASET_ID.fullmatch(name):
        found = "holds no such data" if name and path.exists() else "does not exist"
        raise InputError(f"data.source {name!r} {found}; choices: {SOURCE_CHOICES}")
    import datasets
    import huggingface_hub.constants

    caches = (str(datasets.config.HF_DATASETS_CACHE), huggingface_hub.constants.HF_HUB_CACHE)
    return _load_table(name, name, split=split), caches


def _load_table(name: str, path: str, *, split: str, **options) -> Any:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(path, split=split, **options)
    except Exception as e:
        cause = e
        while cause.__cause__ is not None:
            cause = cause.__cause__
        what = f"data.source {name!r}, split {split!r}, cannot be loaded"
        raise InputError(f"{what}: {hub.reason(cause)}; choices: {SOURCE_CHOICES}") from e
    if len(table) == 0:
        raise InputError(f"data.source {name!r}, split {split!r}, has no rows")
    undecoded = datasets.Image(decode=False)
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, undecoded)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(column, datasets.List(undecoded))
    return table


def _check_columns(columns: Sequence[str], name: str, fields: Sequence[str]) -> str:
    """The name of the image column, if all that a row and the roles' prompts need is there."""
    images = next((c for c in ("images", "image") if c in columns), "")
    missing = [c for c in ("problem", "answer", *fields) if c not in columns] + ([] if images else ["images"])
    if missing:
        raise InputError(f"{name} lacks {', '.join(missing)}; it has the columns {', '.join(columns)}")
    return images


def raw_row(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The four fields every row has, under one name each."""
    ids = (row.get("problem_id"), row.get("id"), index)
    return {
        "id": str(next(i for i in ids if i is not None)),
        "problem": row.get("problem"),
        "answer": row.get("answer"),
        "images": row["images"] if "images" in row else row.get("image"),
    }


def fingerprint(source) -> str:
    """A short text that changes with the number of rows and the texts of 8 of them, not with file paths."""
    size = len(source)
    digest = hashlib.sha256()
    for index in sorted({round(i * (size - 1) / 7) for i in range(8)}) if size else []:
        row = raw_row(source[index], index)
        digest.update(repr((row["id"], row["problem"], row["answer"])).encode("utf-8", "backslashreplace"))
    return f"rows={size} sha256={digest.hexdigest()[:16]}"
