"""Run-health checks: steps whose numbers are not finite, and signs that a policy collapses."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vigos_jax.config import guarded
from vigos_jax.runtime.distributed import process
from vigos_jax.runtime.files import finite_or_none


class Health:
    """Counts skipped steps and watches means over the last steps; the same in every process of a run.

    Args:
      guards: `config.guards`.
      saved: `state()` of the run that this one resumes.
      largest_gap: of `sampler_gap_bound`.

    Attributes:
      skipped: number of steps so far that changed nothing, because their loss or gradient was not finite.
      alerts: metric -> message, for the metrics that are outside their bounds now.
      news: messages about the last step: its new alerts, and that it was skipped, if so.
    """

    def __init__(self, guards: ConfigDict, saved: Mapping[str, Any] | None = None, *, largest_gap: float = math.inf):
        self._largest_gap, self._wide_gap = largest_gap, ""
        saved = saved or {"skipped": 0, "in_a_row": 0, "recent": []}
        self._guards = guards
        self.skipped: int = saved["skipped"]
        self._in_a_row: int = saved["in_a_row"]
        self._recent: list[dict[str, float]] = list(saved["recent"])
        self.alerts: dict[str, str] = self._outside()
        self.news: list[str] = []

    def state(self) -> dict[str, Any]:
        """JSON, for a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "recent": self._recent}

    def update(self, row: Mapping[str, float]) -> None:
        """Takes a step's metrics; what the step did not measure keeps no guard from seeing the others."""
        self._in_a_row = self._in_a_row + 1 if row["skipped"] else 0
        self.skipped += int(row["skipped"])
        seen = {name: float(row[name]) for name in guarded(self._guards) if math.isfinite(row.get(name, math.nan))}
        self._recent = [*self._recent, seen][-self._guards["window"] :]
        gap = float(row.get("sampler_logp_gap", 0.0))
        if gap > self._largest_gap:
            self._wide_gap = (
                f"step {row['step']}: sampler_logp_gap is {gap:.4g}, and must be at most {self._largest_gap:g} "
                "(config.guards.sampler_gap): what sampled is not the student that is trained; see docs/servers.md"
            )
        before, self.alerts = self.alerts, self._outside()
        self.news = [text for name, text in self.alerts.items() if name not in before]
        if row["skipped"]:
            self.news.append(f"step {row['step']} changed nothing: its loss or gradient is not finite")

    def _outside(self) -> dict[str, str]:
        if len(self._recent) < self._guards["window"]:
            return {}
        out = {}
        for name in guarded(self._guards):
            low, high = self._guards[name]
            values = [seen[name] for seen in self._recent if name in seen]
            mean = sum(values) / len(values) if values else low
            if not low <= mean <= high:
                steps = f"over the last {len(self._recent)} steps"
                out[name] = f"{name} is {mean:.4g} {steps}, and must be inside config.guards.{name}=({low:g}, {high:g})"
        return out

    def reason_to_stop(self, folder: pathlib.Path) -> str:
        """Why the run should stop; "" if it should not. folder: where `write_nonfinite` writes."""
        if self._in_a_row >= self._guards["max_skipped"]:
            return (
                f"{self._in_a_row} steps in a row had a loss or gradient that is not finite and changed nothing; their "
                f"rows and rollouts are in {folder}; choices: a lower learning rate, model.dtype=float32, other data"
            )
        if self._wide_gap:
            return self._wide_gap
        return "; ".join(self.alerts.values()) if self._guards["stop"] else ""


def sampler_gap_bound(config: ConfigDict) -> float:
    """The largest `sampler_logp_gap` that a run may have: `config.guards.sampler_gap`, or a default if that is 0.

    The gap includes the student's dropout, the sampler's staleness, and bfloat16 rounding.
    """
    r, bound = config.rollout, config.guards.sampler_gap
    if bound or r.engine == "native":
        return bound or math.inf
    is_exact = config.model.dtype == "float32" and not config.lora.dropout
    is_exact &= r.sync_every == 1 and r.max_staleness == 0
    return 1e-3 if is_exact else 0.1


def write_nonfinite(folder: pathlib.Path, row: Mapping[str, float], records: Sequence[Mapping[str, Any]]) -> None:
    """Writes what a step whose numbers are not finite was made of: its metrics, then this process's rollouts."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(x, ensure_ascii=False) for x in ({k: finite_or_none(v) for k, v in row.items()}, *records)]
    path = folder / f"step-{row['step']}-process-{process()}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
