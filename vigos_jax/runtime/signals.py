"""Signals that ask a run to stop: the first is acted on where nothing is lost by it, a second ends it at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from vigos_jax.errors import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_in_place: list["Interrupt"] = []  # whose contexts last


def asked() -> str:
    """Name of the signal that the `Interrupt` in place has noted; "" for none. For what waits inside a step."""
    return _in_place[-1].asked if _in_place else ""


class Interrupt:
    """Records SIGTERM and SIGINT inside its context; only in the main thread, as Python allows no handlers elsewhere.

    Attributes:
      asked: name of the signal that came; "" while none has.
    """

    def __init__(self):
        self.asked = ""
        self._raises = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in _SIGNALS}
        _in_place.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _in_place.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises Stopped wherever the program is; one that has come before raises it here."""
        if self.asked:
            raise self._stopped()
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _note(self, number: int, frame: object) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = signal.Signals(number).name
        if self._raises:
            raise self._stopped()
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\nvigos_jax: {self.asked}: stopping after this step; once more stops at once\n".encode())

    def _stopped(self) -> Stopped:
        return Stopped(f"{self.asked}: stopped; the same command resumes from what is saved")


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started inside begin with the stopping signals blocked, until `ignore_signals` ignores them.

    Terminals and schedulers send them to a whole group, and the running step still needs what a data worker reads. The
    run ends its workers itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """Makes this process ignore the signals that stop a run."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
