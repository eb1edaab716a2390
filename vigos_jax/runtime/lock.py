"""A lock file that lets one run at a time write to a folder, on network file systems too; it names its holder.

The file exists while the folder is held. It is created atomically: if two processes try at once, one succeeds. A killed
holder leaves it behind. Whether the holder is alive is decided by

- its process, if it can be looked up (same host, boot and PID namespace): one with the same PID and start time;
- otherwise its heartbeat: the holder touches the file every BEAT_SECONDS. A file that was not touched for
  STALE_SECONDS, by the file system's own clock, has no holder any more. Clocks of two hosts are never compared.

Kernel locks (flock) are not used: over networks they are missing, local to a host, or kept for a client that is gone.
"""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from vigos_jax.errors import InputError
from vigos_jax.runtime import workdir as files
from vigos_jax.runtime.distributed import first_decides

BEAT_SECONDS = 15.0
STALE_SECONDS = 120.0  # longer than a network file system may show an old time
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_GONE = "ZX"  # states of processes that have ended and are only still listed


@contextlib.contextmanager
def held(folder: pathlib.Path, *, name: str = files.LOCK, called: str = "") -> Iterator[None]:
    """Holds the lock `name` of a folder, so that no other run can; creates the folder if it is missing.

    With several processes all must enter; the first holds the lock for all. The lock is reentrant within a process. A
    folder that was created here and is still empty at the end is removed.

    Args:
      called: what an error calls a folder that cannot be written, like "config.export.output='out'".

    Raises:
      InputError: another run holds it, who and since when; or the folder cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        first_decides(lambda: stack.enter_context(alone(folder, name=name, called=called)) and None)
        yield


@contextlib.contextmanager
def held_for(output: pathlib.Path, *, workdir: pathlib.Path | None, called: str) -> Iterator[None]:
    """`held` of a folder that is written to, and of the run's workdir where it lies in there."""
    with contextlib.ExitStack() as stack:
        if workdir is not None and output.resolve().is_relative_to(workdir.resolve()):
            stack.enter_context(held(workdir, called=f"to --workdir {workdir}"))
        stack.enter_context(held(output, called=called))
        yield


@contextlib.contextmanager
def alone(folder: pathlib.Path, *, name: str = files.LOCK, called: str = "") -> Iterator["FileLock"]:
    """`held`, where there is one process, which gets the lock."""
    made = []
    try:
        made = _make(folder)
        path = folder.resolve() / name
        if path in _mine:
            lock, times = _mine[path]
        else:
            lock, times = FileLock(path), 0
            lock.take()
    except (OSError, InputError) as e:
        _unmake(made)
        if isinstance(e, InputError):
            raise
        what = called or f"to {folder}"
        raise InputError(f"cannot write {what}: {e.strerror}; choose a writable folder") from e
    _mine[path] = lock, times + 1
    try:
        yield lock
    finally:
        _mine[path] = lock, times
        if not times:
            del _mine[path]
            lock.release()
            _unmake(made)


@dataclasses.dataclass(frozen=True)
class Holder:
    """The holder of a lock.

    Attributes:
      place: host, boot id and PID namespace; processes can be looked up if all three are equal.
      processes: {PID: start time}; the lock is held until the last of them has ended.
      since: when the lock was taken, as text.
      token: unique id of this holder.
    """

    place: tuple[str, ...]
    processes: dict[str, str]
    since: str
    token: str

    @classmethod
    def me(cls) -> "Holder":
        """This process, from now on."""
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        return cls(_place(), {str(os.getpid()): _began(os.getpid())}, since, secrets.token_hex(8))

    def __str__(self) -> str:
        return f"process {next(iter(self.processes))} on {self.place[0]} since {self.since}"

    def to_json(self) -> bytes:
        """What the file holds."""
        return (json.dumps(dataclasses.asdict(self)) + "\n").encode()

    def is_near(self) -> bool:
        """Whether its processes can be looked up from here."""
        return self.place == _place()

    def running(self) -> list[str]:
        """Of a holder that is near: those of its processes that still run."""
        return [number for number, began in self.processes.items() if _is_running(int(number), began)]


class FileLock:
    """A lock file, held from `take` to `release`."""

    def __init__(self, path: pathlib.Path):
        self._path, self._holder = path, Holder.me()
        self._guard, self._ended = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Makes the file. InputError, with its holder, if another has it; OSError if it cannot be written."""
        _take(self._path, self._holder)
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Removes the file if it is still this holder's."""
        self._ended.set()
        if self._thread:
            self._thread.join()
        with contextlib.suppress(OSError):
            if _read(self._path) == self._holder:
                self._path.unlink()

    def share(self, pid: int) -> None:
        """Adds a process started here as a holder: if this process is killed, the lock lasts until that one ends."""
        self._rewrite(self._holder.processes | {str(pid): _began(pid)})

    def unshare(self, pid: int) -> None:
        """Removes a process that has ended from the holders."""
        self._rewrite({k: v for k, v in self._holder.processes.items() if k != str(pid)})

    def _rewrite(self, processes: dict[str, str]) -> None:
        with self._guard:
            self._holder = dataclasses.replace(self._holder, processes=processes)
            temporary = _temporary(self._path, self._holder)
            os.replace(temporary, self._path)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with self._guard, contextlib.suppress(OSError):  # a file system that is away comes back, or ends the run
                if not self._path.exists():  # removed by hand
                    _create(self._path, self._holder)
                found = _read(self._path)
                if found is None or found.token == self._holder.token:
                    os.utime(self._path)
                    continue
                # This process slept (a machine that was suspended), and another run began: two must not write there.
                print(f"vigos_jax: {self._path.parent} was taken over by {found}; ended", file=sys.stderr, flush=True)
                os._exit(2)


# -- one step each ----------------------------------------------------------------------------------------------

_mine: dict[pathlib.Path, tuple[FileLock, int]] = {}  # this process's locks, and how often it has entered each


def _make(folder: pathlib.Path) -> list[pathlib.Path]:
    """Makes a folder; those that were not there, outermost first."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _unmake(made: list[pathlib.Path]) -> None:
    with contextlib.suppress(OSError):  # it is not empty, or gone
        for folder in reversed(made):
            folder.rmdir()


def _take(path: pathlib.Path, holder: Holder) -> None:
    while not _create(path, holder):
        found = _read(path)
        if sign := _sign_of_life(path, found):
            who = found or "a process that left no name"
            raise InputError(f"{path.parent} is in use by {who} ({sign}); wait for it, or choose another folder")
        # Only one process at a time removes a stale file, so that none removes a lock taken in the meantime.
        guard = path.with_name(f"{path.name}.takeover")
        _take(guard, holder)
        try:
            if _read(path) == found and not _sign_of_life(path, found):
                path.unlink(missing_ok=True)
        finally:
            guard.unlink(missing_ok=True)


def _create(path: pathlib.Path, holder: Holder) -> bool:
    """Makes the file with its content in one step; False if there is one already."""
    temporary = _temporary(path, holder)
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        # A network file system may have made the link and lost the word of it.
        return temporary.stat().st_nlink == 2
    except OSError as e:
        if e.errno not in _NO_LINKS:
            raise
    finally:
        temporary.unlink(missing_ok=True)
    try:
        with path.open("xb") as file:
            file.write(holder.to_json())
        return True
    except FileExistsError:
        return False


def _temporary(path: pathlib.Path, holder: Holder) -> pathlib.Path:
    temporary = path.with_name(f"{path.name}.{holder.token}")
    with temporary.open("wb") as file:
        file.write(holder.to_json())
    return temporary


def _read(path: pathlib.Path) -> Holder | None:
    """Who holds the lock; None where that cannot be read, or there is no file."""
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
        value["place"] = tuple(map(str, value["place"]))
        found = Holder(**value)
        return found if found.place and found.processes and all(map(str.isdigit, found.processes)) else None
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None


def _sign_of_life(path: pathlib.Path, found: Holder | None) -> str:
    """The evidence that the holder `found` of a lock is alive; "" if it is not, or if the lock is gone."""
    if found is not None and found.is_near():
        return f"process {found.running()[0]} is running" if found.running() else ""
    probe = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        with probe.open("xb") as file:
            now = os.fstat(file.fileno()).st_mtime  # by the clock that also gave the file its time
        with path.open("rb") as file:  # opening it asks a network file system anew
            age = now - os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:  # released
        return ""
    finally:
        probe.unlink(missing_ok=True)
    alive = f"its last heartbeat was {max(age, 0):.0f} s ago, after {STALE_SECONDS:.0f} s without one it counts as gone"
    return alive if age < STALE_SECONDS else ""


# -- processes --------------------------------------------------------------------------------------------------


def _place() -> tuple[str, ...]:
    """Host, boot, namespace of processes; the last two where the system tells."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return (socket.gethostname(), boot, namespace)


def _stat(pid: int) -> list[str]:
    """State, parent, ... of a process, as proc(5) lists them from the third on; [] where the system does not tell."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _began(pid: int) -> str:
    """When a process began, in ticks since the boot; "" where the system does not tell."""
    fields = _stat(pid)
    return fields[19] if len(fields) > 19 else ""


def _is_running(pid: int, began: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    except OverflowError:
        return False
    fields = _stat(pid)
    if fields and fields[0] in _GONE:
        return False
    return not began or not _began(pid) or began == _began(pid)
