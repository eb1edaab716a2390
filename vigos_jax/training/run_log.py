"""What a run says while it runs: one JSON row per step in metrics.jsonl, and progress for the person watching."""

import itertools
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from vigos_jax.runtime import workdir as files
from vigos_jax.runtime.distributed import is_first
from vigos_jax.runtime.files import finite_or_none, write_whole
from vigos_jax.runtime.jsonl import named, read_steps
from vigos_jax.runtime.progress import Progress, say
from vigos_jax.training.trackers import Tracker, open_trackers


class MetricsFile:
    """Appends rows to `metrics.jsonl`, each step exactly once.

    Args:
      next_step: the first step that will be written. Rows of this and later steps, left by a run that was killed
        after its last checkpoint, are dropped, and so are torn lines, with a warning if a row follows them.

    Attributes:
      last_step: the newest step in the file before rows were dropped; 0 if it had none.
    """

    def __init__(self, path: pathlib.Path, *, next_step: int):
        rows, broken = read_steps(path)
        self.last_step = max((row.value["step"] for row in rows), default=0)
        if broken:
            say(f"warning: {path}: {named(broken)} cannot be read and is left out; a disk or a power cut tore it")
        if path.exists():
            write_whole(path, b"".join(row.text + b"\n" for row in rows if row.value["step"] < next_step))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row at once; it must have `step`. Numbers that are not finite become null."""
        self._file.write(json.dumps({k: finite_or_none(v) for k, v in row.items()}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Brings the rows to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class CompileCounter:
    """Counts the programs this process compiles or takes from the compilation cache, from when it is made."""

    _EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self):
        self.programs, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == self._EVENT:
            self.programs += 1
            self.seconds += duration_secs

    def close(self) -> None:
        """Stops counting."""
        jax.monitoring.unregister_event_duration_listener(self._listen)


class RunLog:
    """What a run logs: a row per step, with the seconds of its phases, and progress. The first process's alone.

    Rows go to metrics.jsonl in `workdir` and to the trackers of `config.log`.

    Args:
      first: steps done before.

    Raises:
      InputError: a tracker that is not installed or cannot be reached.
    """

    def __init__(self, config, workdir: pathlib.Path, *, first: int):
        self._file: MetricsFile | None = None
        self._trackers: list[Tracker] = []
        if is_first():
            self._file = MetricsFile(workdir / files.METRICS, next_step=first + 1)
            self._trackers = open_trackers(config.log, workdir, first=first, last_step=self._file.last_step)
        self._progress = Progress(total=config.steps, start=first, title="train", every=config.log_every)
        self._compiled, self._programs = CompileCounter(), 0
        self._met: set[Any] = set()
        self._phases: list[tuple[str, float]] = []

    def begin(self, phase: str, arrays: Any = None) -> None:
        """A step's phase begins; says so if `arrays` have shapes not met before, as a program is compiled for them."""
        if not self._phases:
            self._programs = self._compiled.programs
        self._phases.append((phase, time.monotonic()))
        shapes = (phase, *(x.shape for x in jax.tree.leaves(arrays) if hasattr(x, "shape")))
        if len(shapes) > 1 and shapes not in self._met:
            self._met.add(shapes)
            self._progress.note(f"compiling the {phase} (shapes not met before)")

    def write(self, row: Mapping[str, float], *, tokens: int, shown: Sequence[str]) -> None:
        """Ends a step: writes its row, with phases, compilations and tokens per second, and shows some of it.

        Args:
          row: has `step`, counted from 1.
          tokens: that were sampled in the step.
          shown: keys of the row; those it lacks are 0.
        """
        names, times = zip(*self._phases, strict=True)
        seconds = [b - a for a, b in itertools.pairwise([*times, time.monotonic()])]
        row = {**row, "compilations": self._compiled.programs - self._programs}
        row |= {f"seconds/{name}": s for name, s in zip(names, seconds, strict=True)}
        row["tokens_per_second"] = tokens / max(sum(seconds), 1e-9)
        self._phases = []
        for tracker in (self._file, *self._trackers) if self._file else ():
            tracker.write(row)
        values = {k.removesuffix("/loss").removesuffix("_rate"): row.get(k, 0.0) for k in shown}
        self._progress.update(int(row["step"]), values)

    def sync(self) -> None:
        """Brings all rows to the disk: a checkpoint that follows must not be newer than they are."""
        if self._file:
            self._file.sync()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.close()
        self._compiled.close()
        for tracker in (self._file, *self._trackers) if self._file else ():
            tracker.close()
