"""Append-only JSON Lines, keyed by a hash of the content: a record survives a kill and is not made twice."""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from vigos_jax.errors import InputError


def content_key(*parts: Any) -> str:
    """A short key of JSON values: equal for equal contents, whatever the order of their fields."""
    text = json.dumps(parts, sort_keys=True, default=list)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:24]


class Journal:
    """Appended records by key. Use as a context manager, in a folder that is `lock.held`.

    A torn last line, left by a process that was killed while it wrote, is cut off; a broken line before it is an error.

    Args:
      keys_only: what was recorded is not kept in memory, only that it was; `[]` then gives None.
    """

    def __init__(self, path: pathlib.Path, *, keys_only: bool = False):
        self._keys_only = keys_only
        self._records: dict[str, dict[str, Any] | None] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            self._file.truncate(self._read(path))
        except OSError as e:
            raise InputError(f"cannot write {path}: {e.strerror}; choose a writable folder") from e

    def _read(self, path: pathlib.Path) -> int:
        """Takes the records in; returns the bytes up to the end of the last whole one."""
        whole = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                    if not isinstance(record["key"], str):
                        raise ValueError("the key is not text")
                    self._records[record["key"]] = None if self._keys_only else record
                except (ValueError, KeyError, TypeError, RecursionError) as e:
                    raise InputError(f"{path}, line {number}, is not a record with a key; move the file away") from e
                whole += len(line)
        return whole

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> dict[str, Any] | None:
        return self._records[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def append(self, key: str, record: Mapping[str, Any]) -> None:
        """Writes a record at once; a second one of the same key takes the first one's place."""
        record = {"key": key, **record}
        self._file.write((json.dumps(record) + "\n").encode("utf-8", "backslashreplace"))
        self._file.flush()
        self._records[key] = None if self._keys_only else record

    def sync(self) -> None:
        """Waits until all is on the disk."""
        os.fsync(self._file.fileno())
