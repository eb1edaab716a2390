"""Tables of rows: parquet, data sets of the hub, and those that the `datasets` library saved. Nothing is decoded.

A folder's parquet files are chosen here, by a rule that can be told, not by the library's guess from their names.
"""

import glob
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vigos_jax.errors import InputError
from vigos_jax.runtime import hub
from vigos_jax.runtime.progress import say

DATASET_ID = re.compile(r"([\w.-]+/)?[\w.-]+")  # of a data set on the hub; some have no owner
SOURCE_CHOICES = (
    "a .jsonl file, a .json file with a list, a .parquet file, a folder of .parquet files, a hub data set (owner/name)"
)
# What names of files and folders say of a split: train.parquet, train-00000-of-00002.parquet, test/0.parquet.
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_PART_NUMBER = re.compile(r"[-_.]?[0-9]{1,6}([-_]of[-_][0-9]{1,6})?([-_][0-9a-f]{8,})?$")
_OTHER_DATA = (".jsonl", ".json", ".csv", ".tsv", ".arrow", ".tar", ".zip")


class Table(Sequence):
    """Rows of a `datasets.Dataset`, memory-mapped: images as bytes or paths, labels by their names.

    Attributes:
      name: where they come from.
      image_roots: folders that paths of images may lead into, see `read_image`.
      column_names: all of them, or those that were selected.
    """

    def __init__(self, table: Any, *, name: str, image_roots: Sequence[str]):
        self.name, self.image_roots = name, tuple(image_roots)
        self.column_names = list(table.column_names)
        self._features = {c: f for c, f in table.features.items() if _labels(f)}
        self._table = table
        self._rows = table.with_format("arrow")  # Python's format would decode images, at any depth

    def select(self, columns: Sequence[str]) -> "Table":
        """The same rows with these columns alone."""
        return Table(self._table.select_columns(list(columns)), name=self.name, image_roots=self.image_roots)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        row = self._rows[int(index)].to_pylist()[0]
        return row | {c: _named(row[c], feature) for c, feature in self._features.items()}


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
    """A value with the names of its labels instead of their numbers."""
    import datasets

    if value is None:
        return None
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
    path = pathlib.Path(name).expanduser()
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
    return _load(name, caches, name, split=split)


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
    """The split that a file's name, or that of a folder around it, says; "" if it says none."""
    inside = file.relative_to(folder)
    for part in (inside.stem, *reversed(inside.parts[:-1])):
        word = _PART_NUMBER.sub("", part).lower()
        for split, names in _SPLIT_NAMES.items():
            if word in names:
                return split
    return ""


def _of_split(name: str, folder: pathlib.Path, files: list[pathlib.Path], *, split: str) -> list[pathlib.Path]:
    """The files of a folder that a split is made of; what is left out is said.

    A file whose name says `split` belongs to it; for "train", so does one whose name says none. Where no name says any
    split, all files are what was asked for.
    """
    asked = next((key for key, names in _SPLIT_NAMES.items() if split in names), split)
    own = [f for f in files if _PART_NUMBER.sub("", f.stem) == split or split in f.relative_to(folder).parts[:-1]]
    of = {f: asked if f in own else _split_of(f, folder) for f in files}
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
    """Parquet files, all of them, as one table."""
    _check_labels(name, files)
    # Where links lead too: the hub's cache is made of them.
    roots = dict.fromkeys(str(p) for f in files for p in (folder or f.parent, f.resolve().parent))
    paths = [glob.escape(str(f.absolute())) for f in files]
    return _load(name, tuple(roots), "parquet", split="train", data_files={"train": paths})


def _check_labels(name: str, files: Sequence[pathlib.Path]) -> None:
    """Raises InputError where a label's number has one name in one file and another in the next."""
    import datasets
    import pyarrow.parquet

    first: dict[str, Any] = {}
    for file in files:
        try:
            features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(file))
        except Exception as e:
            raise InputError(
                f"data.source {name!r}, {file.name}, cannot be loaded: {hub.reason(e)}; it must be parquet"
            ) from e
        for column, feature in features.items():
            if (labels := _labels(feature)) and first.setdefault(column, labels) != labels:
                names = f"{first[column]} in {files[0].name}, {labels} in {file.name}"
                raise InputError(f"data.source {name!r}: the labels of {column} differ: {names}; write them as texts")


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
    return _checked(table, name, (str(folder), str(folder.resolve())), split=split)


def _load(name: str, roots: Sequence[str], path: str, *, split: str, **options: Any) -> Table:
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
    return _checked(table, name, roots, split=split)


def _checked(table: Any, name: str, roots: Sequence[str], *, split: str) -> Table:
    if len(table) == 0:
        raise InputError(f"data.source {name!r}, split {split!r}, has no rows")
    return Table(table, name=name, image_roots=roots)
