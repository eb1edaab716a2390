"""Counts unusable rows by reason, with an example of each, and says when the data is too broken to continue."""

import collections
from collections.abc import Mapping

from vigos_jax.errors import InputError

MIN_ROWS = 100  # a bad fraction is judged as if at least this many rows had been seen
MIN_ROWS_ALL_BAD = 8  # but if none of the first rows is usable, this many are enough


class BadRows:
    """Counts unusable rows of all processes by reason, and says when there are too many.

    Attributes:
      rows: rows seen so far.
      reasons: how many of them are bad, by reason.
      examples: the first row of each reason, for people: where it stands, and the value.
    """

    def __init__(self):
        self.rows = 0
        self.reasons: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, str] = {}

    @property
    def bad(self) -> int:
        """Rows that could not be used."""
        return self.reasons.total()

    def update(self, rows: int, reasons: Mapping[str, int], examples: Mapping[str, str] | None = None) -> None:
        """Adds `rows` more, how many of them are bad for which reason, and an example of each reason."""
        self.rows += rows
        self.reasons.update(reasons)
        self.examples = {**(examples or {}), **self.examples}

    def summary(self) -> str:
        """One line: "3 of 64 rows bad: image_unreadable 2 (line 7, id '7': ...), empty_answer 1 (...)"."""

        def told(kind: str, count: int) -> str:
            return f"{kind} {count}" + (f" ({self.examples[kind]})" if kind in self.examples else "")

        kinds = ", ".join(told(kind, count) for kind, count in self.reasons.most_common())
        return f"{self.bad} of {self.rows} rows bad" + (f": {kinds}" if kinds else "")

    def check(self, max_fraction: float) -> None:
        """Raises InputError, with the counts, if the data is too broken to continue.

        A few bad rows at the start prove little: they may be `max_fraction` of the rows seen or of MIN_ROWS,
        whichever is more. But if none of the first MIN_ROWS_ALL_BAD rows or more is usable, that is enough.
        """
        if self.bad == self.rows >= MIN_ROWS_ALL_BAD:
            raise InputError(f"no usable row: {self.summary()}; see --mode data and docs/data.md for what a row needs")
        if self.bad > max_fraction * max(self.rows, MIN_ROWS):
            raise InputError(f"{self.summary()}; data.max_bad_fraction allows {max_fraction:g}")
