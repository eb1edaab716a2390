"""Are two mathematical expressions equal? math-verify's answer, from a process that can be killed.

Answers are text that a model wrote: `9**9**9` would compute for ever, `10**10**10` would take all memory. A worker
process bounds both; one that misses its deadline is killed, and a new one takes its place.

    python -m vigos_jax.grading.algebra       is the worker: a JSON line in, a JSON line out
"""

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
from typing import Any

MAX_CHARS = 1000  # a longer expression is not an answer
_MEMORY = 2 * 2**30  # bytes a worker may take
_START_SECONDS = 60.0  # until a new worker must have answered that it is there


class MathGrader:
    """Compares expressions, one at a time. Use as a context manager; safe to share between threads.

    Attributes:
      deadline: seconds after which a comparison counts as failed.
      killed: workers that missed it so far.
    """

    def __init__(self, *, deadline: float = 5.0):
        self.deadline = deadline
        self.killed = 0
        self._worker: subprocess.Popen | None = None
        self._lines: queue.Queue[str] = queue.Queue()
        self._lock = threading.Lock()
        self._missed: set[tuple[str, str]] = set()  # pairs that are not asked again

    def __enter__(self) -> "MathGrader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            for pipe in (self._worker.stdin, self._worker.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()
            self._worker = None

    def is_equal(self, prediction: str, reference: str) -> bool | None:
        """Whether the two mean the same; None if that cannot be said: unreadable, too long, or out of time."""
        if max(len(prediction), len(reference)) > MAX_CHARS:
            return None
        with self._lock:
            if (prediction, reference) in self._missed:
                return None
            if self._worker is None or self._worker.poll() is not None:
                self.close()
                self._start()
            killed = self.killed
            equal = self._ask({"prediction": prediction, "reference": reference}, self.deadline)
            if self.killed > killed:
                self._missed.add((prediction, reference))
            return equal

    def _start(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._worker = subprocess.Popen(
            [sys.executable, "-m", "vigos_jax.grading.algebra"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._lines = queue.Queue()
        threading.Thread(target=_pump, args=(self._worker.stdout, self._lines), daemon=True).start()
        if self._ask({"prediction": "1", "reference": "1"}, _START_SECONDS) is not True:
            self.close()
            raise RuntimeError("the math worker does not start; try: python -m vigos_jax.grading.algebra")

    def _ask(self, question: dict[str, str], deadline: float) -> bool | None:
        assert self._worker is not None and self._worker.stdin is not None  # it was started with pipes
        try:
            self._worker.stdin.write(json.dumps(question) + "\n")
            self._worker.stdin.flush()
            line = self._lines.get(timeout=deadline)
        except (OSError, queue.Empty):
            self.killed += 1
            self.close()
            return None
        return json.loads(line)["equal"] if line else None  # "" is its end


def _pump(pipe: Any, lines: "queue.Queue[str]") -> None:
    """Hands on what the worker writes; an empty line when it has ended."""
    with contextlib.suppress(ValueError, OSError):
        for line in pipe:
            lines.put(line)
    lines.put("")


def _compare(prediction: str, reference: str) -> bool | None:
    """math-verify's verdict; None if it cannot parse one of the two."""
    import math_verify

    # Its cleaning would also take letters off an end, as if they were units: "x + 2m" would be "x + 2".
    keep_units = dataclasses.replace(math_verify.LatexExtractionConfig().normalization_config, units=False)
    kinds = (math_verify.LatexExtractionConfig(normalization_config=keep_units), math_verify.ExprExtractionConfig())
    parse: Any = math_verify.parse  # its annotation forgets that None means no limit
    # Its own timeouts use signals, which need the main thread; here the parent process enforces the deadline.
    gold, ours = (parse(f"${x}$", kinds, parsing_timeout=None) for x in (reference, prediction))
    return bool(math_verify.verify(gold, ours, timeout_seconds=None)) if gold and ours else None


def _serve() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not part of the answer
    for line in sys.stdin:
        question = json.loads(line)
        try:
            equal = _compare(**question)
        except Exception:  # sympy raises anything on text like this; MemoryError too
            equal = None
        print(json.dumps({"equal": equal}), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
