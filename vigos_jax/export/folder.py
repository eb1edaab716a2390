"""The folder of an export: complete or absent, even if it is a mount point or on another file system.

Files are written to a hidden folder: next to the final one, and then renamed; or inside the final one if it already
exists and is empty, like a mount point. From inside, the files are moved out at the end, config last.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

from vigos_jax.errors import InputError
from vigos_jax.runtime import lock
from vigos_jax.runtime import workdir as files
from vigos_jax.runtime.files import write_json

_INSIDE = ".exporting"
_MOVED = ".moved"  # in there: the names of what is being moved out
_LAST = ("config.json", "adapter_config.json")  # without it no program takes a folder for a model
_NOTHING = (_INSIDE, files.LOCK, "lost+found")  # what a folder may hold and be empty


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run's export wrote, kept in the workdir so that the run recognises the folder later.

    Attributes:
      output: the folder.
      kind, dtype: of `config.export`.
      step: optimizer steps of the student.
      files: bytes by name.
    """

    output: str
    kind: str
    dtype: str
    step: int
    files: dict[str, int]

    @classmethod
    def of(cls, path: pathlib.Path) -> "Record | None":
        """The record in a file; None where there is none that can be read."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def is_there(self, output: pathlib.Path) -> bool:
        """Whether `output` is the folder of this record, and holds its files."""
        sizes = _sizes(output) if str(output.resolve()) == self.output else {}
        return bool(self.files) and self.files.items() <= sizes.items()


def _sizes(folder: pathlib.Path) -> dict[str, int]:
    """Bytes of the files in a folder and below."""
    paths = [p for p in folder.rglob("*") if p.is_file() and not p.is_relative_to(folder / _INSIDE)]
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in paths}


def held_for(output: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Inside, no other export is written there. Its lock lies where the hidden folder will."""
    called, target = f"config.export.output={str(output)!r}", output.resolve()
    if target.is_dir():
        return lock.held(target, called=called)
    return lock.held(target.parent, name=f".{target.name}{files.LOCK}", called=called)


def check_free(output: pathlib.Path) -> None:
    """Raises InputError unless an export may be written there: where nothing is, or an empty folder."""
    target = output.resolve()
    moved = _moved(target / _INSIDE)
    if target.exists() and (not target.is_dir() or any(p.name not in (*_NOTHING, *moved) for p in target.iterdir())):
        raise InputError(f"config.export.output={str(output)!r} exists and is not an empty folder; choose another")


def prepare(output: pathlib.Path, *, size: int) -> pathlib.Path:
    """Makes the hidden folder, empty: what an export that was killed left is removed.

    Args:
      size: bytes that are going to be written.

    Raises:
      InputError: as `check_free`; or it cannot be written, or does not fit.
    """
    check_free(output)
    target = output.resolve()
    beside, inside = target.with_name(f".{target.name}{_INSIDE}"), target / _INSIDE
    temporary = inside if target.is_dir() else beside
    try:
        for name in _moved(inside):
            _remove(target / name)
        for left in (beside, inside):
            _remove(left)
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
    except OSError as e:
        raise InputError(f"cannot write config.export.output={str(output)!r}: {e.strerror}; choose another") from e
    if size > free:
        temporary.rmdir()
        raise InputError(
            f"config.export.output={str(output)!r} needs {size / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB; "
            "choose another, or config.export.kind=adapter, or config.export.dtype=bfloat16"
        )
    return temporary


def publish(temporary: pathlib.Path, output: pathlib.Path, *, record: pathlib.Path | None, facts: Any) -> None:
    """Syncs the written files to disk, then moves them into place.

    Args:
      record: file to write the `Record` to before the move; None for none.
      facts: `kind`, `dtype` and `step` of the record.

    Raises:
      InputError: they cannot be moved; they stay where they were written.
    """
    target = output.resolve()
    _sync(temporary)
    if record is not None:
        write_json(record, {"output": str(target), **facts, "files": _sizes(temporary)})
    try:
        if target.is_dir():
            _move_out(temporary, target)
        else:
            try:
                os.rename(temporary, target)
            except OSError:  # another file system, or somebody made the folder
                check_free(output)
                target.mkdir(exist_ok=True)
                _move_out(temporary, target)
        _sync_one(target.parent)
    except (OSError, shutil.Error) as e:
        reason = getattr(e, "strerror", None) or e
        raise InputError(
            f"cannot put the export at config.export.output={str(output)!r}: {reason}; move it, it is complete in "
            f"{temporary}"
        ) from e


def _move_out(temporary: pathlib.Path, target: pathlib.Path) -> None:
    names = sorted((p.name for p in temporary.iterdir()), key=lambda name: (name in _LAST, name))
    write_json(temporary / _MOVED, names)
    _sync_one(temporary)
    for name in names:
        shutil.move(temporary / name, target / name)
    _sync(target)
    (temporary / _MOVED).unlink()  # from here on the folder is whole
    shutil.rmtree(temporary)
    _sync_one(target)


def _moved(folder: pathlib.Path) -> list[str]:
    """Names of the files that a killed export was moving out of a hidden folder."""
    try:
        return [str(name) for name in json.loads((folder / _MOVED).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: pathlib.Path) -> None:
    """Brings a folder and all below it to the disk."""
    for path in sorted(folder.rglob("*")):
        _sync_one(path)
    _sync_one(folder)


def _sync_one(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
