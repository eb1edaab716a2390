"""A run's files as its pages read them: a config with all required sections, and metrics that are finite or None."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from vigos_jax.errors import InputError
from vigos_jax.runtime import workdir as files
from vigos_jax.runtime.files import read_object
from vigos_jax.runtime.jsonl import read_steps

_NEEDED = ("batch_size", "data", "model", "roles", "seed", "steps")
Row = Mapping[str, float | None]


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """A run, read from its workdir.

    Attributes:
      rows: of metrics.jsonl; evals: of eval.jsonl. What is not a finite number is None.
      results: {"base" and "trained": rates of the demo}; without those that are not there.
    """

    config: Mapping[str, Any]
    rows: list[Row]
    evals: list[Row]
    results: Mapping[str, Row]


def read_run(workdir: pathlib.Path) -> RunFiles:
    """Reads a run. Files other than its config may be missing, or end in a torn line.

    Raises:
      InputError: a file cannot be read, or the config is not a run's.
    """
    config = read_object(workdir / files.CONFIG, owner="a run's workdir")
    missing = [name for name in _NEEDED if name not in config]
    if missing or not isinstance(config["roles"], dict):
        lacks = missing[0] if missing else "a table of roles"
        raise InputError(f"{workdir / files.CONFIG} must be a run's config, as a run writes it: it lacks {lacks}")
    try:
        rows, evals = (
            [_row(row.value) for row in read_steps(workdir / f)[0]] for f in (files.METRICS, files.EVALUATIONS)
        )
    except OSError as e:
        raise InputError(f"cannot read {e.filename}: {e.strerror}; a run's page needs it") from e
    path = workdir / files.RESULTS
    results = read_object(path, owner="a run's page") if path.exists() else {}
    results = {name: _row(results[name]) for name in ("base", "trained") if isinstance(results.get(name), dict)}
    return RunFiles(config, rows, evals, results)


def _row(row: Mapping[str, Any]) -> Row:
    return {key: _number(value) for key, value in row.items()}


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return value if is_number and math.isfinite(value) else None
    except OverflowError:  # a whole number that no float can hold
        return None
