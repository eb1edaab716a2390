"""FOLDER/index.html: the runs in a folder, with a line each, and chosen ones' curves and configs beside each other."""

import json
import os
import pathlib
import urllib.parse
from collections.abc import Iterator, Sequence

from vigos_jax.config import flatten
from vigos_jax.errors import InputError
from vigos_jax.report.charts import MAX_POINTS, SMOOTH_FROM, smooth, thin
from vigos_jax.report.page import PALETTE, ComparedRun, Comparison, write_page
from vigos_jax.report.run_files import Row, read_run
from vigos_jax.runtime import workdir as files

INDEX = "index.html"
_DEPTH = 3  # how far below the folder runs are looked for
# What is drawn of each run, as (key of metrics.jsonl, title, unit); of eval.jsonl all averages are.
_CURVES = (
    ("accuracy", "Accuracy", "share of rollouts"),
    ("loss", "Loss", "nats per token, all roles"),
    ("valid_rate", "Valid format", "share of rollouts"),
    ("entropy", "Entropy", "nats per token"),
    ("completion_tokens", "Length", "tokens"),
    ("grad_norm", "Gradient norm", "before the clip"),
)
_HEAD = ("steps", "accuracy", "loss", "valid", "Score", "bad rows", "skipped")


def write_index(folder: pathlib.Path) -> pathlib.Path:
    """Draws the page from the files of the runs in `folder`, and returns where it is; equal files give an equal page.

    Raises:
      InputError: there is no run, or no such folder.
    """
    runs = {path.relative_to(folder).as_posix(): path for path in find_runs(folder)}
    if not runs:
        raise InputError(
            f"{str(folder)!r} holds no run, down to {_DEPTH} folders below; it must hold folders with "
            f"{files.CONFIG} and {files.METRICS}"
        )
    shown, unread = [], []
    for name, path in sorted(runs.items()):
        try:
            shown.append(_run(name, path))
        except InputError as e:  # the others are still to be seen
            unread.append(f"{name}: {e}")
    note = (
        "Accuracy, loss, valid: mean of the last twentieth of the steps. Score: of the trained student, on the demo. "
        "Choose runs to compare: pale is every step, or a few of a long run at a time, strong their moving mean."
    )
    if unread:
        note += f" Not read: {'; '.join(unread)}."
    comparison = Comparison("Runs", note, PALETTE, _HEAD, shown)
    write_page(folder / INDEX, f"Runs in {folder.absolute().name}", [comparison])
    return folder / INDEX


def find_runs(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the run folders in `folder`: those with a config and metrics. Runs are not nested."""
    for path, folders, names in os.walk(folder, followlinks=True):  # no deeper than _DEPTH, so no circle either
        here = pathlib.Path(path)
        if files.CONFIG in names and files.METRICS in names:
            yield here
            folders.clear()
        elif len(here.relative_to(folder).parts) >= _DEPTH:
            folders.clear()


def _run(name: str, path: pathlib.Path) -> ComparedRun:
    run = read_run(path)
    rows = run.rows
    curves = {title: _curve(rows, key) for key, title, _ in _CURVES}
    units = {title: unit for _, title, unit in _CURVES}
    for key in sorted({key for row in run.evals for key in row if key.endswith("/avg")}):
        title = f"Benchmark {key.removesuffix('/avg')}"
        curves[title], units[title] = _curve(run.evals, key), "percent right"
    curves = {title: points for title, points in curves.items() if points}
    last = rows[-1] if rows else {}
    cells = (
        f"{last.get('step', 0)} of {run.config['steps']}",
        *(_text(_ending(rows, key)) for key in ("accuracy", "loss", "valid_rate")),
        _text(run.results.get("trained", {}).get("score")),
        *(_text(last.get(key, 0)) for key in ("bad_rows", "skipped_steps")),
    )
    fields = {field: json.dumps(value, ensure_ascii=False) for field, value in flatten(run.config)}
    page = path / files.PAGE
    href = urllib.parse.quote(os.fsencode(f"{name}/{files.PAGE}")) if page.exists() else ""
    return ComparedRun(name, href, cells, fields, curves, {title: units[title] for title in curves})


def _curve(rows: Sequence[Row], key: str) -> list[tuple[float, float | None, float | None]]:
    """(step, number, moving mean) of what is shown; [] where there is no number at all."""
    points = [(row["step"] or 0, row.get(key)) for row in rows]
    if all(y is None for _, y in points):
        return []
    few = thin(points, MAX_POINTS)
    means = [m.mean for m in smooth(few)] if len(few) >= SMOOTH_FROM else [y for _, y in few]
    return [(x, y, mean) for (x, y), mean in zip(few, means, strict=True)]


def _ending(rows: Sequence[Row], key: str) -> float | None:
    values = [y for row in rows[-max(1, len(rows) // 20) :] if (y := row.get(key)) is not None]
    return sum(values) / len(values) if values else None


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
