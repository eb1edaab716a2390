r"""JSON Lines: a value per line, in UTF-8; a line ends at "\n" and nowhere else.

`str.splitlines` also ends lines at U+2028, U+0085 and others that stand inside JSON texts. A byte order mark at the
beginning of a line, as some editors write and as stays in the middle of files put together, is skipped.
"""

import codecs
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class StepRow:
    """A line of a file with a row per step: its bytes, without the line's end, and what they say."""

    text: bytes
    value: dict[str, Any]


def lines_of(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes) of the lines that are not blank, without their ends. OSError if it cannot be read."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.rstrip(b"\r\n")
            while line.startswith(codecs.BOM_UTF8):
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line


def parse_object(line: bytes) -> dict[str, Any]:
    """The object of a line; ValueError, with the reason, for anything else."""
    try:
        value = json.loads(line.decode("utf-8"))
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def read_steps(path: pathlib.Path) -> tuple[list[StepRow], list[int]]:
    """The rows of a file to which a run appends one per step, and the numbers of the lines that are not such rows.

    A row is an object with an integer `step`. Broken lines after the last row, left by a kill or a power cut, are not
    reported, as those steps are written again. A missing file counts as empty.
    """
    rows: list[StepRow] = []
    broken: list[int] = []
    since_last_row: list[int] = []
    for number, line in lines_of(path) if path.exists() else ():
        try:
            value = parse_object(line)
            if type(value.get("step")) is not int:
                raise ValueError("it has no step")
        except ValueError:
            since_last_row.append(number)
        else:
            broken += since_last_row
            since_last_row = []
            rows.append(StepRow(line, value))
    return rows, broken


def named(numbers: Sequence[int]) -> str:
    """Line numbers in words: "line 3", "lines 3, 7 and 12 more"."""
    shown = ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
    return f"line{'s' if len(numbers) > 1 else ''} {shown}"
