"""JSON files: objects read with errors that name the file, values written whole or not at all."""

import collections
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from vigos_jax.errors import InputError


def read_object(path: pathlib.Path, *, owner: str) -> dict[str, Any]:
    """The JSON object in a file that `owner` ("a model folder") needs.

    Raises:
      InputError: the file cannot be read or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}; {owner} needs it") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} must be valid JSON: {e}") from e
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON; see `write_whole`."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Writes under a temporary name and renames: the final name never holds half a file, after a power cut neither."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def check_own(folder: pathlib.Path, *, field: str, first: str, others: Sequence[str]) -> None:
    """Raises InputError if a mode would overwrite files that it did not write.

    Args:
      field: the config field that names the folder.
      first: the file that the mode writes first; if it exists, the folder belongs to the mode.
      others: the files that would be overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"config.{field}={str(folder)!r} is not a folder; choose another")
    found = [name for name in others if (folder / name).exists()]
    if found and not (folder / first).exists():
        raise InputError(
            f"config.{field}={str(folder)!r} holds a {found[0]} and no {first}: it is not this mode's, and would be "
            "overwritten; choose another folder"
        )


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(..., object_pairs_hook=)`: ValueError where of two values of one name the first would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        name, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name[:100]!r} is there twice")
    return values


def finite_or_none(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
