"""Counts unusable rows by reason, and says when the data is too broken to go on."""

import collections
from collections.abc import Mapping

from vigos_jax.errors import InputError

MIN_ROWS = 100  # a bad fraction is judged as if at least this many rows had been seen
MIN_ROWS_ALL_BAD = 8  # but if none of the first rows is usable, this many are enough


class BadRows:
    """Counts unusable rows of all processes by reason, and says when there are too many."""

    def __init__(self):
        self.rows = 0
        self.reasons: collections.Counter[str] = collections.Counter()

    @property
    def bad(self) -> int:
        """Rows that could not be used."""
        return self.reasons.total()

    def update(self, rows: int, reasons: Mapping[str, int]) -> None:
        """Adds `rows` more, and how many of them are bad for which reason."""
        self.rows += rows
        self.reasons.update(reasons)

    def summary(self) -> str:
        """One line: "3 of 64 rows bad: image_unreadable 2, empty_answer 1"."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.reasons.most_common())
        return f"{self.bad} of {self.rows} rows bad" + (f": {kinds}" if kinds else "")

    def check(self, max_fraction: float) -> None:
        """Raises InputError, with the counts, if the data is too broken to go on.

        A few bad rows at the start prove little: they may be `max_fraction` of the rows seen or of MIN_ROWS,
        whichever is more. But if none of the first MIN_ROWS_ALL_BAD rows or more is usable, that is enough.
        """
        if self.bad == self.rows >= MIN_ROWS_ALL_BAD:
            raise InputError(f"no usable row: {self.summary()}")
        if self.bad > max_fraction * max(self.rows, MIN_ROWS):
            raise InputError(f"{self.summary()}; data.max_bad_fraction allows {max_fraction:g}")
