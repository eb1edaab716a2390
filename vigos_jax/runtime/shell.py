"""The program in a shell: exit codes, other libraries' messages only if asked for, broken pipes handled."""

import ctypes
import logging
import os
import select
import sys
import warnings
from collections.abc import Callable

from absl import logging as absl_logging

_ARENA_MAX = -8  # M_ARENA_MAX of malloc.h
_INTERRUPTED, _NO_READER = 130, 141  # what shells give for SIGINT and SIGPIPE: 128 + the signal


def run(program: Callable[[list[str]], int], argv: list[str], *, verbose: bool) -> int:
    """Runs `program(argv)` and returns its exit code; 130 after Ctrl-C, 141 for a broken pipe.

    Args:
      verbose: show what other libraries log and warn of; else only their errors.
    """
    set_verbosity(verbose)
    keep_one_heap()
    try:
        code = program(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\nvigos_jax: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        gone = [number for number in (1, 2) if _has_no_reader(number)]
        if not gone:  # a pipe or socket of our own
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in gone:  # Python flushes both once more when it ends
            os.dup2(nowhere, number)
        return _NO_READER


def set_verbosity(verbose: bool) -> None:
    """Sets what other libraries' loggers and Python's warnings write to stderr; call it before most are imported."""
    if verbose:
        os.environ["TRANSFORMERS_VERBOSITY"] = "info"
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        absl_logging.set_verbosity(absl_logging.INFO)
        return
    logging.getLogger().setLevel(logging.ERROR)
    absl_logging.set_verbosity(absl_logging.ERROR)
    # It says that there is an accelerator which jax cannot use: the one warning that must be shown.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def keep_one_heap() -> None:
    """Has glibc serve all threads from one heap; elsewhere nothing. Call it before there are threads.

    By default there are up to eight per core. Threads that come and go, as a save's do, leave theirs half empty, and a
    run of many saves grows by that.
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
