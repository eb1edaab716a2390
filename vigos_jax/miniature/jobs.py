"""Long lists of commands, some at a time, each once: what is finished stays, what was stopped is done again.

A command is begun when those it needs are done; of those that can begin, the first of the list.
"""

import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from vigos_jax.errors import InputError
from vigos_jax.runtime.files import read_object, write_json
from vigos_jax.runtime.lock import alone
from vigos_jax.runtime.progress import say

BAD_INPUT = 2  # exit code of a command that refuses what it was given


@dataclasses.dataclass(frozen=True)
class Job:
    """One command line.

    Attributes:
      name: unique, a file name.
      arguments: after `python -m`.
      done: the file that says it is finished.
      needs: names of jobs that must be done before, each earlier in the list.
      may_fail: whether the others go on without it if its command refuses its input (exit code 2).
    """

    name: str
    arguments: tuple[str, ...]
    done: pathlib.Path
    needs: tuple[str, ...] = ()
    may_fail: bool = False


class Jobs:
    """Runs jobs and keeps a record and a log of each. Use as a context manager.

    `folder` is its own, until the last process it started has ended: no other process may run jobs there meanwhile.

    Args:
      workers: jobs at a time, each on its share of the cores.
      revision: of the code, for the records.

    Raises:
      InputError: others are at work in the folder.
    """

    def __init__(self, folder: pathlib.Path, *, workers: int, revision: str = ""):
        self._folder, self._workers, self._revision = folder, workers, revision
        self._closes = contextlib.ExitStack()
        self._lock = self._closes.enter_context(alone(folder))
        self._processes: set[subprocess.Popen] = set()
        self._is_stopping, self._guard = False, threading.Lock()

    def __enter__(self) -> "Jobs":
        return self

    def __exit__(self, *exc: object) -> None:
        self._closes.close()

    def is_done(self, job: Job) -> bool:
        """Whether the job was finished before, by these very arguments.

        Raises:
          InputError: it was finished by others.
        """
        record = self._folder / f"{job.name}.json"
        if not (job.done.exists() and record.exists()):
            return False
        made_by = read_object(record, owner="the study").get("arguments", [])
        if made_by != list(job.arguments):
            before, now = (sorted(set(a) - set(b)) for a, b in ((made_by, job.arguments), (job.arguments, made_by)))
            raise InputError(f"{job.done.parent} was made with {before}, not {now}; choose another --workdir")
        return True

    def run(self, jobs: Sequence[Job], *, on_end: Callable[[Job], None] = lambda _: None) -> None:
        """Runs those that are not done. `on_end` is called after each, from this thread.

        Raises:
          InputError: a command failed or was stopped. No further one starts then, and those that run are asked to end.
        """
        waiting, shares = [job for job in jobs if not self.is_done(job)], _shares(self._workers)
        ended, total = {job.name for job in jobs} - {job.name for job in waiting}, len(waiting)
        with ThreadPoolExecutor(self._workers, initializer=lambda: _stay_on(shares.pop())) as pool:
            running: dict[Future[str], Job] = {}
            try:
                while waiting or running:
                    ready = [job for job in waiting if ended.issuperset(job.needs)][: self._workers - len(running)]
                    for job in ready:
                        waiting.remove(job)
                        running[pool.submit(self._run, job)] = job
                    if not running:
                        raise ValueError(f"{waiting[0].name} needs {waiting[0].needs}: not all are in the list")
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        job = running.pop(future)
                        ended.add(job.name)
                        say(f"{total - len(waiting) - len(running)}/{total}  {job.name}  {future.result()}")
                        on_end(job)
            except BaseException:
                self._stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _run(self, job: Job) -> str:
        """Runs one command and returns how that went: its seconds, or why it failed."""
        began, log = time.perf_counter(), self._folder / f"{job.name}.log"
        with log.open("w", encoding="utf-8") as file:
            with self._guard:
                if self._is_stopping:
                    raise InputError(f"{job.name} was not begun")
                # Gone before the record is there: whatever lies there from before is not taken for this one's.
                job.done.unlink(missing_ok=True)
                write_json(self._folder / f"{job.name}.json", {"arguments": job.arguments, "revision": self._revision})
                process = subprocess.Popen(
                    [sys.executable, "-m", *job.arguments],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for us; a job is asked to end once, not twice
                )
                self._processes.add(process)
                self._lock.share(process.pid)
            code = process.wait()
        with self._guard:
            self._processes.discard(process)
            self._lock.unshare(process.pid)
        if code or not job.done.exists():
            how = f"exit code {code}" if code else "it was stopped"
            if code == BAD_INPUT and job.may_fail and not self._is_stopping:
                return f"{how}; what it said is in {log}"
            self._stop()
            raise InputError(f"{job.name}: {how}; what it said is in {log}; the same command resumes")
        return f"{time.perf_counter() - began:.0f} s"

    def _stop(self) -> None:
        with self._guard:
            self._is_stopping = True
            for process in self._processes:
                process.terminate()  # a training run then saves its step


def _shares(workers: int) -> list[set[int]]:
    """The cores of each worker; empty where a process cannot be held on some."""
    if not hasattr(os, "sched_getaffinity"):
        return [set()] * workers
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[i % len(cores) :: workers]) for i in range(workers)]


def _stay_on(cores: set[int]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)  # of this thread, and of the processes it starts
