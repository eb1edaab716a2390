"""`--mode score`: the objective on rollouts made by any engine, token by token, without an optimizer."""

import json
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vigos_jax.data.loader import Example
from vigos_jax.data.sources import JsonlSource
from vigos_jax.errors import InputError
from vigos_jax.method.losses import EntryScores, RoleStats, role_losses, role_stats, total_loss
from vigos_jax.method.packing import Rollout, pack_scores
from vigos_jax.method.roles import TeacherRole, roles_per_token
from vigos_jax.method.scoring import score_batch
from vigos_jax.models.variables import Variables
from vigos_jax.rollouts.parse import Case, read_cases, spans_json
from vigos_jax.runtime.files import write_json
from vigos_jax.runtime.progress import bar
from vigos_jax.session import Loaded


def token_lists(
    rollout: Rollout, entries: Mapping[str, np.ndarray], roles: Sequence[TeacherRole]
) -> dict[str, list[Any]]:
    """Lists over a completion's tokens, None where nobody scores one; of roles that score one twice, the first's.

    Args:
      entries: [E] each: role, position, kl, kl_clipped, student_logp, teacher_logp of the rollout's row.

    Returns:
      role (its name) and the last four; `by_role`, the same for each role, where a token may have two.
    """
    n = len(rollout.ids)
    fields = ("kl", "kl_clipped", "student_logp", "teacher_logp")
    out: dict[str, Any] = {"role": [None] * n} | {f: [None] * n for f in fields}
    by_role = {r.name: {f: [None] * n for f in fields} for r in roles}
    for e in np.flatnonzero(entries["role"] >= 0):
        j, name = int(entries["position"][e]), roles[entries["role"][e]].name
        for f in fields:
            by_role[name][f][j] = float(entries[f][e])
        if out["role"][j] is None:
            out["role"][j] = name
            for f in fields:
                out[f][j] = float(entries[f][e])
    if roles_per_token(roles) > 1:
        out["by_role"] = by_role
    return out


def rollouts_source(path: str, field: str, config) -> JsonlSource:
    """Opens a rollouts file; InputError naming `field` if there is none."""
    if not path or not pathlib.Path(path).expanduser().is_file():
        raise InputError(f"config.{field}={path!r} must be a .jsonl file of rollouts")
    return JsonlSource(pathlib.Path(path).expanduser(), fields=tuple(config.data.fields))


def score_rollouts(
    loaded: Loaded, trained: Variables, config, *, overlay: Variables
) -> tuple[dict[str, Any], list[str]]:
    """Scores `config.score.rollouts` into `config.score.output`: scores.jsonl and summary.json.

    Args:
      overlay: what lies over the base for the teachers.

    Returns:
      (summary, one line per bad row with its line number in the file).

    Raises:
      InputError: no such file, or no usable row.
    """
    source = rollouts_source(config.score.rollouts, "score.rollouts", config)
    if not config.score.output:
        raise InputError("config.score.output='' must be a folder for scores.jsonl and summary.json")
    output = pathlib.Path(config.score.output).expanduser()
    size = loaded.whole_batch(config.score.batch_size)
    roles = loaded.roles

    @jax.jit
    def run(base: Any, trained: Variables, overlay: Variables, batch: Any) -> tuple[EntryScores, RoleStats]:
        options = {"roles": roles, "chunk": config.loss.chunk, "temperature": config.loss.temperature}
        scores = score_batch(loaded.model, base, trained, batch, overlay=overlay, **options)
        return scores, role_stats(scores, batch.entries, count=len(roles), reduction=config.loss.reduction)

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot write to config.score.output={str(output)!r}: {e.strerror}; choose a folder") from e
    temporary = output / "scores.jsonl.tmp"
    totals = RoleStats(*(np.zeros(len(roles)) for _ in range(5)))
    bad, valid, rows, bad_lines = Counter(), 0, 0, []
    cases = read_cases(source, loaded, config)
    with temporary.open("w", encoding="utf-8") as file:
        for _ in bar(range(-(-len(source) // size)), title="score"):
            part = [case for _, case in zip(range(size), cases, strict=False)]
            slots = part + [Case(-1, Example(""))] * (size - len(part))
            batch = pack_scores(
                [case.row for case in slots],
                [case.rollout for case in slots],
                roles=roles,
                config=loaded.config,
                buckets=loaded.buckets,
            )
            scores, stats = jax.device_get(run(loaded.base, trained, overlay, loaded.put_batch(batch)))
            totals = jax.tree.map(lambda a, b: a + np.float64(b), totals, stats)
            for i, case in enumerate(part):
                rows += 1
                if case.bad_reason:
                    bad[case.bad_reason] += 1
                    bad_lines.append(f"{source.path}:{source.line(rows - 1)}: id {case.example.id}: {case.bad_reason}")
                    file.write(json.dumps({"id": case.example.id, "error": case.bad_reason}) + "\n")
                    continue
                valid += case.rollout.spans.is_valid
                entries = {k: getattr(batch.entries, k)[i] for k in ("role", "position")}
                entries |= {k: getattr(scores, k)[i] for k in ("kl", "student_logp", "teacher_logp")}
                entries["kl_clipped"] = np.minimum(scores.kl[i], batch.entries.clip[i])
                record = {
                    "id": case.example.id,
                    "is_valid": case.rollout.spans.is_valid,
                    "completion_ids": list(case.rollout.ids),
                    "spans": spans_json(case.rollout),
                    **token_lists(case.rollout, entries, roles),
                }
                file.write(json.dumps(record) + "\n")
    if rows == sum(bad.values()):
        temporary.unlink()
        raise InputError(f"{source.path} has no usable row: " + ", ".join(f"{k} {n}" for k, n in bad.items()))
    losses = role_losses(totals, totals.shares)
    summary: dict[str, Any] = {"loss": float(total_loss(totals, totals.shares, roles=roles))}
    for r, role in enumerate(roles):
        tokens = float(totals.tokens[r])
        summary[role.name] = {
            "loss": float(losses[r]),
            "tokens": int(tokens),
            "clipped_fraction": float(totals.clipped_tokens[r] / max(tokens, 1.0)),
        }
    summary |= {"rows": rows, "valid_rows": valid, "bad_rows": dict(bad)}
    temporary.rename(output / "scores.jsonl")
    write_json(output / "summary.json", summary)
    return summary, bad_lines
