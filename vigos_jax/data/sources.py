"""Where rows come from: a hub data set, parquet, jsonl or json, with random access and images left undecoded.

A source's row has `id`, `problem`, `answer`, `images` and `options`, found by `config.data.columns` or by common names
(see `columns`), and other fields of the file: `wrong_answers`, the columns of `config.data.fields`.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vigos_jax.data.columns import NAMES, Columns, find_columns, lookup
from vigos_jax.data.images import TrustedRoot
from vigos_jax.data.tables import Table, open_table
from vigos_jax.errors import InputError
from vigos_jax.grading.answer_text import mentions
from vigos_jax.runtime.progress import say

VIEW_COLUMNS = "columns of roles' images"  # a row's key for {column: value} of `load_source`'s `columns`
_SAMPLES = 1000  # evenly spaced rows from which the columns of a file without a header are inferred


def _spread(size: int, most: int) -> list[int]:
    """At most so many places, evenly spread."""
    return list(range(size)) if size <= most else [i * size // most for i in range(most)]


class Source(Sequence):
    """Rows with random access, and what a source may declare about itself; the defaults hold for any data.

    Attributes:
      image_roots: folders that paths of images may lead into, see `read_image`.
      has_own_evaluation: whether a run on it ends with the demo's evaluation, results.json.
    """

    image_roots: tuple[str, ...] = ()
    columns: Columns = Columns()
    has_own_evaluation = False

    def place(self, index: int) -> str:
        """Where a row stands, for people."""
        return f"row {index}"

    def probes(self, *, count: int, seed: int) -> "Source":
        """The source whose first `count` rows a run answers repeatedly; by default this source."""
        return self

    def for_diagnosis(self, *, count: int, seed: int) -> "Source":
        """The source whose first `count` rows a diagnosis samples rollouts for; by default this source."""
        return self

    def is_leaky(self, index: int, description: str, answer: str | None) -> bool:
        """Whether the description contains the final answer, which is legitimate if the image shows it."""
        return bool(answer and mentions(description, answer))


class TableSource(Source):
    """Rows of a `Table`; only the columns that a row needs are read.

    Args:
      mapping: `config.data.columns`.
      fields: further columns that must be there.
      views: the columns of roles' images.
    """

    def __init__(
        self,
        table: Table,
        *,
        mapping: Mapping[str, str] | None = None,
        fields: Sequence[str] = (),
        views: Sequence[str] = (),
    ):
        names = table.column_names
        texts = table.select([name for name in names if name.casefold() not in NAMES["images"]])
        samples = [texts[i] for i in _spread(len(texts), 20)]
        options = {"mapping": mapping, "fields": fields, "views": views, "samples": samples}
        self.columns = find_columns(names, where=table.name, **options)
        wanted = {path if path in names else path.split(".")[0] for path in (*self.columns.names(), *views)}
        self._fields, self._views = tuple(fields), tuple(views)
        self._table = table.select([c for c in names if c in wanted or c in ("wrong_answers", *fields)])
        self.image_roots = table.image_roots

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        return _read(self.columns, self._table[int(index)], int(index), self._fields, self._views)


class JsonlSource(Source):
    """Rows of a .jsonl file, read when asked for; other fields are handed on as they are.

    Memory holds only the lines' places. Every read opens the file, so threads and processes can share it.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        mapping: Mapping[str, str] | None = None,
        fields: Sequence[str] = (),
        views: Sequence[str] = (),
    ):
        self.path = os.path.abspath(path)
        self.image_roots, self._fields, self._views = _roots(self.path), tuple(fields), tuple(views)
        starts, numbers, position = [], [], 0
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        starts.append(position)
                        numbers.append(number)
                    position += len(line)
        except OSError as e:
            raise InputError(
                f"cannot read {self.path}: {e.strerror}; config.data.source must be a file that can be read"
            ) from e
        self._starts = np.asarray(starts, np.int64)  # byte offset of each line that is not blank
        self._numbers = np.asarray(numbers, np.int64)
        lines = [self._parse(i) for i in _spread(len(self), _SAMPLES)]
        samples = [line for line in lines if not isinstance(line, str)]
        if not samples:
            what = "its lines are not UTF-8" if "not_utf8" in lines else "no line is a JSON object"
            raise InputError(f"{self.path} has no usable row: {what}; it must hold one JSON object per line")
        names = list(dict.fromkeys(name for row in samples for name in row))
        options = {"mapping": mapping, "fields": fields, "views": views, "samples": samples}
        self.columns = find_columns(names, where=self.path, **options)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        raw = self._parse(int(index))
        if isinstance(raw, str):
            return _read(Columns(), {}, int(index)) | {"bad_reason": raw}
        return {"bad_detail": ""} | _read(
            self.columns, raw | {"bad_reason": None}, int(index), self._fields, self._views
        )

    def line(self, index: int) -> int:
        """The row's line in the file, counted from 1."""
        return int(self._numbers[index])

    def place(self, index: int) -> str:
        """The row's line."""
        return f"line {self.line(index)}"

    def _parse(self, index: int) -> dict[str, Any] | str:
        """A line's object, or why it is none."""
        with open(self.path, "rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            return "not_utf8"
        except (ValueError, RecursionError):
            return "bad_json"
        return value if isinstance(value, dict) else "bad_json"


class JsonSource(Source):
    """Rows of a .json file that holds a list of objects, all of them in memory."""

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        mapping: Mapping[str, str] | None = None,
        fields: Sequence[str] = (),
        views: Sequence[str] = (),
    ):
        self.path = os.path.abspath(path)
        self.image_roots, self._fields, self._views = _roots(self.path), tuple(fields), tuple(views)
        try:
            rows = json.loads(pathlib.Path(self.path).read_bytes().decode("utf-8-sig"))
        except OSError as e:
            raise InputError(
                f"cannot read {self.path}: {e.strerror}; config.data.source must be a file that can be read"
            ) from e
        except UnicodeDecodeError as e:
            raise InputError(f"{self.path} must be UTF-8: {e.reason} at byte {e.start}") from e
        except (ValueError, RecursionError) as e:
            hint = "; a file of one object a line is called .jsonl" if "Extra data" in str(e) else ""
            raise InputError(f"{self.path} must be JSON: {e}{hint}") from e
        if not isinstance(rows, list) or not any(isinstance(row, dict) for row in rows):
            raise InputError(f"{self.path} has no usable row: it must hold a list of objects")
        self._rows = rows
        samples = [rows[i] for i in _spread(len(rows), _SAMPLES) if isinstance(rows[i], dict)]
        names = list(dict.fromkeys(name for row in samples for name in row))
        options = {"mapping": mapping, "fields": fields, "views": views, "samples": samples}
        self.columns = find_columns(names, where=self.path, **options)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        raw = self._rows[int(index)]
        if not isinstance(raw, dict):
            return _read(Columns(), {}, int(index)) | {"bad_reason": "bad_json"}
        return {"bad_detail": ""} | _read(
            self.columns, raw | {"bad_reason": None}, int(index), self._fields, self._views
        )


def _roots(path: str) -> tuple[str, ...]:
    """The folder of a file and that of its symlink target: in the hub's cache, the images are there."""
    return tuple(dict.fromkeys((os.path.dirname(path), os.path.dirname(os.path.realpath(path)))))


def _read(
    columns: Columns, row: Mapping[str, Any], index: int, fields: Sequence[str] = (), views: Sequence[str] = ()
) -> dict[str, Any]:
    """A row with its parts under this program's names; aliases of these are dropped unless in `config.data.fields`.

    Roles' image columns are kept separately, under VIEW_COLUMNS, so that they are not taken for the row's own images.
    """
    own = {v.split(".")[0] for v in views} - columns.names() - set(fields)
    others = {name: value for name, value in row.items() if name not in ("problem_id", "image", "choices", *own)}
    others |= {name: row.get(name) for name in fields}
    others |= {VIEW_COLUMNS: {name: lookup(row, name) for name in views}} if views else {}
    return others | columns.read(row, index)


_FILES = {".jsonl": JsonlSource, ".ndjson": JsonlSource, ".json": JsonSource}


def load_source(data, *, columns: Sequence[str] = ()) -> TableSource | JsonlSource | JsonSource:
    """Opens `data.source` of `config.data`: one of SOURCE_CHOICES; InputError if it cannot be used.

    Args:
      columns: those of roles' images, dotted paths; never taken for the row's own unless `data.columns` names them.

    `data.split` is the split of a hub data set or folder; a single file is taken whole, whatever it says.
    Parquet and hub data sets pass through the `datasets` library's cache on disk.
    """
    name = data.source
    path = pathlib.Path(name).expanduser()
    options = {"mapping": data.columns, "fields": data.fields, "views": columns}
    kind = _FILES.get(path.suffix.lower())
    if name and kind is not None and path.is_file():
        source = kind(path, **options)
    else:
        source = TableSource(open_table(name, split=data.split), **options)
    if said := source.columns.describe():
        say(f"data.source {name}: {said}")
    if data.image_folder:
        folder = pathlib.Path(data.image_folder).expanduser().absolute()
        if not folder.is_dir():
            raise InputError(f"config.data.image_folder={data.image_folder!r} must be a folder")
        source.image_roots = (TrustedRoot(folder), *source.image_roots)
    return source


def raw_row(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The parts of a row that has them under this program's names, as those of every source do."""
    return Columns().read(row, index)


def fingerprint(source) -> str:
    """A short text that changes with the number of rows and the texts of 8 of them, not with file paths."""
    size = len(source)
    digest = hashlib.sha256()
    for index in sorted({round(i * (size - 1) / 7) for i in range(8)}) if size else []:
        row = raw_row(source[index], index)
        digest.update(repr((row["id"], row["problem"], row["answer"])).encode("utf-8", "backslashreplace"))
    return f"rows={size} sha256={digest.hexdigest()[:16]}"
