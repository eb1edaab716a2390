"""The program in a shell: exit codes, other libraries' messages only if asked for, output that cannot be written."""

import contextlib
import ctypes
import io
import logging
import os
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from absl import logging as absl_logging

_ARENA_MAX = -8  # M_ARENA_MAX of malloc.h
_INTERRUPTED, _NO_READER = 130, 141  # what shells give for SIGINT and SIGPIPE: 128 + the signal
_UNWRITTEN = 1  # done, and not all of it could be said


class Output(io.TextIOWrapper):
    """stdout or stderr that never ends the work that writes to it, except by a broken pipe.

    Attributes:
      error: why something could not be written, None if all could.
    """

    error: OSError | None = None

    def write(self, text: str, /) -> int:
        """As every text stream's; what cannot be written is dropped."""
        try:
            return super().write(text)
        except BrokenPipeError:
            raise
        except OSError as e:
            self.error = self.error or e
            return len(text)

    def flush(self) -> None:
        """As every text stream's."""
        try:
            super().flush()
        except BrokenPipeError:
            raise
        except OSError as e:
            self.error = self.error or e


def run(program: Callable[[list[str]], int], argv: list[str], *, verbose: bool) -> int:
    """Runs `program(argv)` and returns its exit code.

    130 after Ctrl-C, 141 for a broken pipe, 1 for work that is done but could not be printed, 128 + the signal for
    SIGTERM and SIGHUP, which end the program as an exception does: what it holds is released.

    Args:
      verbose: show what other libraries log and warn of; else only their errors.
    """
    open_outputs()
    set_verbosity(verbose)
    keep_one_heap()
    try:
        with _ended_in_order():
            code = program(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nvigos_jax: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except _Ended as e:
        print(f"vigos_jax: {e.number.name}: ended", file=sys.stderr)
        return 128 + e.number
    except BrokenPipeError:
        gone = [number for number in (1, 2) if _has_no_reader(number)]
        if not gone:  # a pipe or socket of our own
            raise
        _drop(gone)
        return _NO_READER
    finally:
        unwritten = {n: s.error for n, s in ((1, sys.stdout), (2, sys.stderr)) if isinstance(s, Output) and s.error}
        _drop(unwritten)
    if 1 in unwritten:
        print(f"vigos_jax: not all output could be written: {unwritten[1].strerror}", file=sys.stderr)
        return code or _UNWRITTEN
    return code


def open_outputs() -> None:
    """Replaces stdout and stderr, so that neither unencodable text nor a full disk ends a run that writes to them.

    Characters that the terminal's encoding lacks are escaped. A stream that was closed at startup is None in Python,
    and its descriptor would go to the next file opened, so the descriptor is opened on the null device.
    """
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            _occupy(number)
            if number:
                setattr(sys, name, Output(io.FileIO(number, "w", closefd=False), encoding="utf-8", write_through=True))
        elif number and stream is getattr(sys, f"__{name}__") and not isinstance(stream, Output):
            setattr(sys, name, _forgiving(stream))


def _forgiving(stream: Any) -> TextIO:
    options = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    return Output(stream.detach(), encoding=stream.encoding, errors="backslashreplace", **options)


def _occupy(number: int) -> None:
    """Opens a file descriptor that is closed on what can be read, and fails to be written to."""
    try:
        os.fstat(number)
    except OSError:
        nowhere = os.open(os.devnull, os.O_RDONLY)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)


def _drop(numbers: Iterable[int]) -> None:
    """Lets streams write to nowhere from now on: Python flushes them once more when it ends."""
    for number in numbers:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


class _Ended(BaseException):
    """A signal that ends the program came."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = signal.Signals(number)


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Inside, signals that would end the process at once raise an error, unless somebody handles or ignores them."""

    def end(number: int, frame: object) -> None:
        raise _Ended(number)

    is_main = threading.current_thread() is threading.main_thread()  # Python allows no handlers elsewhere
    changed = [n for n in (signal.SIGTERM, signal.SIGHUP) if is_main and signal.getsignal(n) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def set_verbosity(verbose: bool) -> None:
    """Sets what other libraries' loggers and Python's warnings write to stderr; call it before most are imported."""
    if verbose:
        os.environ["TRANSFORMERS_VERBOSITY"] = "info"
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        absl_logging.set_verbosity(absl_logging.INFO)
        return
    logging.getLogger().setLevel(logging.ERROR)
    # We report a checkpoint that cannot be written in one line; orbax would log hundreds.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _say_unraisable
    # It says that there is an accelerator which jax cannot use: the one warning that must be shown.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _say_unraisable(unraisable: Any) -> None:
    """Python's own hook, but for what tensorstore's threads say of a save that has failed already."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def keep_one_heap() -> None:
    """Makes glibc use one heap (arena) for all threads; does nothing elsewhere. Call it before threads are started.

    The default is up to eight arenas per core. Short-lived threads, as of a save, leave theirs half empty, so that the
    memory of a run grows with its saves.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    set_option(_ARENA_MAX, 1)


def _has_no_reader(number: int) -> bool:
    poll = select.poll()
    poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))
