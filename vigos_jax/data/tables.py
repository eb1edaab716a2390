"""Tables of rows: parquet, data sets of the hub, and those that the `datasets` library saved. Nothing is decoded.

A folder's parquet files are chosen here, by a rule that can be told, not by the library's guess from their names.
"""

import bisect
import glob
import itertools
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vigos_jax.errors import InputError
from vigos_jax.runtime import hub
from vigos_jax.runtime.progress import say

DATASET_ID = re.compile(r"([\w.-]+/)?[\w.-]+")  # of a data set on the hub; some have no owner
SOURCE_CHOICES = (
    "a .jsonl file, a .json file with a list, a .parquet file, a folder of .parquet files, a hub data set (owner/name)"
)
# Words in names of files and folders that say a split: train-00000-of-00002.parquet, geo_train, test/0.parquet, testA.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "minival"),
    "test": ("test", "testing", "eval", "evaluation", "testmini", "testdev"),
}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_OTHER_DATA = (".jsonl", ".json", ".csv", ".tsv", ".arrow", ".tar", ".zip")


class Table(Sequence):
    """Rows of `datasets.Dataset`s, memory-mapped, one table after the other: images as bytes or paths, labels by name.

    Tables of different columns or types stay as they are: nothing is cast, and a column that a table lacks is None.

    Attributes:
      name: where they come from.
      image_roots: folders that paths of images may lead into, see `read_image`.
      column_names: all of them, or those that were selected.
    """

    def __init__(self, tables: Sequence[Any], *, name: str, image_roots: Sequence[str]):
        self.name, self.image_roots = name, tuple(image_roots)
        self.column_names = list(dict.fromkeys(c for table in tables for c in table.column_names))
        self._tables = list(tables)
        # Python's format would decode images, at any depth.
        self._rows = [table.with_format("arrow") for table in tables]
        self._convert = [{c: f for c, f in t.features.items() if _labels(f) or _is_short_float(f)} for t in tables]
        self._ends = list(itertools.accumulate(len(table) for table in tables))

    def select(self, columns: Sequence[str]) -> "Table":
        """The same rows with these columns alone."""
        tables = [table.select_columns([c for c in columns if c in table.column_names]) for table in self._tables]
        return Table(tables, name=self.name, image_roots=self.image_roots)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        which = bisect.bisect_right(self._ends, index)
        start = self._ends[which - 1] if which else 0
        found = self._rows[which][index - start].to_pylist()
        row = dict.fromkeys(self.column_names) | (found[0] if found else {})
        return row | {c: _named(row[c], feature) for c, feature in self._convert[which].items()}


def _is_short_float(feature: Any) -> bool:
    """Whether a column's numbers have fewer digits than Python shows of them: 0.1 would be 0.10000000149011612."""
    # An array of numbers has the same `dtype`.
    return type(feature).__name__ == "Value" and feature.dtype in ("float32", "float16")


def _labels(feature: Any) -> Any:
    """The names of the labels somewhere inside a feature, in a form that can be compared; falsy without any."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    if isinstance(feature, Mapping):
        return {name: found for name, f in feature.items() if (found := _labels(f))}
    inner = getattr(feature, "feature", feature if isinstance(feature, list) else None)
    return _labels(inner[0] if isinstance(inner, list) else inner) if inner is not None else None


def _named(value: Any, feature: Any) -> Any:
    """A value with the names of its labels instead of their numbers, and numbers as they were written."""
    import datasets

    if value is None:
        return None
    if _is_short_float(feature):
        return float(str(np.dtype(feature.dtype).type(value)))
    if isinstance(feature, datasets.ClassLabel):
        return feature.names[value] if 0 <= value < len(feature.names) else None
    if isinstance(value, list):
        inner = getattr(feature, "feature", feature)
        return [_named(v, inner[0] if isinstance(inner, list) else inner) for v in value]
    if isinstance(value, Mapping):
        fields = getattr(feature, "feature", feature)
        return {name: _named(v, fields[name]) if _labels(fields[name]) else v for name, v in value.items()}
    return value


def open_table(name: str, *, split: str) -> Table:
    """Parquet, a hub data set or one that `datasets` saved to disk.

    Args:
      name: one of SOURCE_CHOICES but for .jsonl and .json.
      split: of a hub data set or a folder; a single file is taken whole, whatever it says.

    Raises:
      InputError: there is no such thing, it cannot be read, or it has no rows.
    """
    path = pathlib.Path(name).expanduser().absolute()  # its folder is shown where an image is not in it
    if name and path.suffix == ".parquet" and path.is_file():
        return _load_files(name, [path])
    if name and path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _load_saved(name, path, split=split)
        if files := _parquet_files(path):
            return _load_files(name, _of_split(name, path, files, split=split), folder=path)
    if path.exists() or path.suffix in (".jsonl", ".json", ".parquet") or not DATASET_ID.fullmatch(name):
        raise InputError(f"data.source {name!r} {_what_is_there(name, path)}; choices: {SOURCE_CHOICES}")
    import datasets
    import huggingface_hub.constants

    caches = (str(datasets.config.HF_DATASETS_CACHE), huggingface_hub.constants.HF_HUB_CACHE)
    return Table([_load(name, name, split=split)], name=name, image_roots=caches)


def _what_is_there(name: str, path: pathlib.Path) -> str:
    if not name or not path.exists():
        return "does not exist"
    if path.is_dir() and (found := sorted(p.name for p in path.iterdir() if p.suffix in _OTHER_DATA)):
        return f"is a folder without parquet files (it has {', '.join(found[:5])})"
    return "holds no such data"


def _parquet_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """All below the folder, but for hidden ones: `._train.parquet` of a Mac, `_temporary` of a job that was killed."""
    files = sorted(p for p in folder.rglob("*.parquet") if p.is_file())
    return [p for p in files if not any(part.startswith((".", "_")) for part in p.relative_to(folder).parts)]


def _split_of(file: pathlib.Path, folder: pathlib.Path) -> str:
    """The split that a word in the name of a file or of a parent folder denotes; "" if none does."""
    inside = file.relative_to(folder)
    for part in (inside.stem, *reversed(inside.parts[:-1])):
        for word in _WORD.findall(part):
            for split, words in _SPLIT_WORDS.items():
                if word.lower() in words:
                    return split
    return ""


def _is_named(file: pathlib.Path, folder: pathlib.Path, split: str) -> bool:
    """Whether a file, or a folder around it, has the name of a split of the user's own, "chart"."""
    parts = [*file.relative_to(folder).parts[:-1], file.stem]
    return any(split == part or split in re.split(r"[-_. ]", part) for part in parts)


def _of_split(name: str, folder: pathlib.Path, files: list[pathlib.Path], *, split: str) -> list[pathlib.Path]:
    """The files of a folder that belong to a split; files left out are logged.

    A file belongs to `split` if its name denotes it; for "train", also if its name denotes no split. If no name denotes
    a split, all files belong to the requested one.
    """
    asked = next((key for key, words in _SPLIT_WORDS.items() if split in words), split)
    of = {f: asked if _is_named(f, folder, split) else _split_of(f, folder) for f in files}
    said = {s for s in of.values() if s}
    wanted = (asked, "") if asked == "train" or not said else (asked,)
    chosen = [f for f in files if of[f] in wanted]
    left = [str(f.relative_to(folder)) for f in files if f not in chosen]
    if not chosen:
        raise InputError(f"data.source {name!r} has no split {split!r}; its files are {', '.join(left[:20])}")
    others = sorted(p.name for p in folder.iterdir() if p.suffix in _OTHER_DATA and not p.name.startswith((".", "_")))
    if left or others:
        read = f"{len(chosen)} parquet file(s) read as split {split!r}"
        what = "; ".join(filter(None, [", ".join(left[:10]), ", ".join(others[:10])]))
        say(f"data.source {name}: {read} ({', '.join(f.name for f in chosen[:10])}); left out: {what}")
    return chosen


def _load_files(name: str, files: Sequence[pathlib.Path], *, folder: pathlib.Path | None = None) -> Table:
    """Parquet files, all of them; those of the same columns and types as one table."""
    # Where links lead too: the hub's cache is made of them.
    roots = dict.fromkeys(str(p) for f in files for p in (folder or f.parent, f.resolve().parent))
    groups: dict[bytes, list[pathlib.Path]] = {}
    for file in files:
        schema, size = _schema(name, file)
        if size:
            groups.setdefault(schema.serialize().to_pybytes(), []).append(file)
    if not groups:
        raise InputError(f"data.source {name!r} has no rows in {len(files)} file(s); it needs at least one")
    tables = []
    for group in groups.values():
        paths = [glob.escape(str(f.absolute())) for f in group]
        schema = _schema(name, group[0])[0]
        # The library has no type for mappings with keys of their own.
        columns = [field.name for field in schema if not str(field.type).startswith("map<")]
        tables.append(_load(name, "parquet", split="train", data_files={"train": paths}, columns=columns))
    return Table(tables, name=name, image_roots=tuple(roots))


def _schema(name: str, file: pathlib.Path) -> tuple[Any, int]:
    """(a file's columns with what is said of them, its number of rows)."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            return opened.schema_arrow, opened.metadata.num_rows
    except Exception as e:
        reason = f"{hub.reason(e)}; it must be parquet"
        raise InputError(f"data.source {name!r}, {file.name}, cannot be loaded: {reason}") from e


def _load_saved(name: str, folder: pathlib.Path, *, split: str) -> Table:
    import datasets

    try:
        table: Any = datasets.load_from_disk(str(folder))
    except Exception as e:
        raise InputError(f"data.source {name!r} cannot be loaded: {hub.reason(e)}; choices: {SOURCE_CHOICES}") from e
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise InputError(f"data.source {name!r} has no split {split!r}; choices: {', '.join(map(str, table))}")
        table = table[split]
    return Table([_checked(table, name, split=split)], name=name, image_roots=(str(folder), str(folder.resolve())))


def _load(name: str, path: str, *, split: str, **options: Any) -> Any:
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
    return _checked(table, name, split=split)


def _checked(table: Any, name: str, *, split: str) -> Any:
    if len(table) == 0:
        raise InputError(f"data.source {name!r}, split {split!r}, has no rows; it needs at least one")
    return table
