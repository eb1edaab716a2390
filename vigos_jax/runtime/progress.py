"""Lines and bars for the person watching: the first process's alone, and intact when both are shown."""

import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from tqdm import tqdm

from vigos_jax.runtime.distributed import is_first


def say(text: str) -> None:
    """A line for the person watching, by the first process; keeps a progress bar intact."""
    if is_first():
        tqdm.write(text, file=sys.stderr)


class Progress:
    """A progress bar on a terminal, else plain lines: for the first step since the start, each `every`-th and the last.

    The lines' rate leaves out that first step, which may have compiled for minutes. Shown by the first process alone.
    """

    def __init__(self, *, total: int, start: int, title: str, every: int):
        self._bar = tqdm(total=total, initial=start, desc=title, disable=_is_silent(), dynamic_ncols=True)
        self._title, self._total, self._every = title, total, every
        self._since, self._first = time.monotonic(), start + 1

    def note(self, text: str) -> None:
        """What is going on right now, on the bar only."""
        self._bar.set_postfix_str(text)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Step `step` (counted from 1) is done."""
        text = " ".join(f"{name} {value:.3g}" for name, value in values.items())
        self._bar.update()
        self._bar.set_postfix_str(text)
        if not self._bar.disable or not is_first():
            return
        now = time.monotonic()
        words = "".join(f"{part}  " for part in (f"{self._title} {step}/{self._total}", text) if part)
        if step == self._first:
            print(f"{words}the first took {now - self._since:.1f} s", file=sys.stderr, flush=True)
            self._since = now
        elif step % self._every == 0 or step == self._total:
            rate = (now - self._since) / (step - self._first)
            left = tqdm.format_interval(rate * (self._total - step))
            print(f"{words}{rate:.2f} s/step, {left} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()


def bar(items: Iterable[Any], *, title: str) -> Iterable[Any]:
    """Iterates with a bar on a terminal, silently elsewhere."""
    return tqdm(items, desc=title, disable=_is_silent(), leave=False, dynamic_ncols=True)


def _is_silent() -> bool:
    return not (is_first() and sys.stderr.isatty())
