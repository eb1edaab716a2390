"""`--mode score`: the objective on rollouts made by any engine, token by token, without an optimizer."""

import dataclasses
import json
import pathlib
from collections import Counter
from typing import Any

import jax
import numpy as np

from vigos_jax.data.examples import Example
from vigos_jax.data.sources import JsonlSource
from vigos_jax.errors import InputError
from vigos_jax.method.batch import SupervisedTokens
from vigos_jax.method.losses import ObjectiveConfig, RoleStats, TokenScores, role_losses, role_stats, total_loss
from vigos_jax.method.roles import TeacherRole, roles_per_token
from vigos_jax.method.rows import Rollout
from vigos_jax.method.scoring import score_batch
from vigos_jax.models.variables import Variables
from vigos_jax.rollouts.parse import Case, read_cases, spans_json
from vigos_jax.runtime.files import check_own, write_json
from vigos_jax.runtime.progress import bar
from vigos_jax.session import Session, view_columns


def token_lists(
    rollout: Rollout, supervised: SupervisedTokens, scores: TokenScores, roles: tuple[TeacherRole, ...]
) -> dict[str, list[Any]]:
    """Lists over a completion's tokens; None where no role scores the token, the first role's values where several do.

    Args:
      supervised, scores: numpy arrays [E], of the rollout's row.

    Returns:
      `role` (a name), `kl` (the role's divergence), `kl_clipped`, `student_logp`, `teacher_logp`; `weight` if any role
      weights its tokens; `by_role`, the same without `role` for every role, if a token may have several. A number that
      is not finite is None.
    """
    n = len(rollout.ids)
    values = {
        "kl": scores.divergence,
        "kl_clipped": np.minimum(scores.divergence, supervised.clip),
        "student_logp": scores.student_logp,
        "teacher_logp": scores.teacher_logp,
    }
    if any(role.token_weights != "uniform" for role in roles):
        values["weight"] = scores.weight
    out: dict[str, Any] = {"role": [None] * n} | {f: [None] * n for f in values}
    by_role: dict[str, dict[str, list[Any]]] = {r.name: {f: [None] * n for f in values} for r in roles}
    for e in np.flatnonzero(np.asarray(supervised.role) >= 0).tolist():
        j, name = int(supervised.position[e]), roles[int(supervised.role[e])].name
        for f, of_token in values.items():
            by_role[name][f][j] = _finite(of_token[e])
        if out["role"][j] is None:
            out["role"][j] = name
            for f, of_token in values.items():
                out[f][j] = _finite(of_token[e])
    if roles_per_token(roles) > 1:
        out["by_role"] = by_role
    return out


def _finite(x: Any) -> float | None:
    return float(x) if np.isfinite(x) else None


def _check_rollouts(path: str, field: str) -> None:
    if not path or not pathlib.Path(path).expanduser().is_file():
        raise InputError(f"config.{field}={path!r} must be a .jsonl file of rollouts")


def output_of(config) -> pathlib.Path:
    """`config.score.output`; InputError if it or the file to be scored is not named, or it holds something else."""
    _check_rollouts(config.score.rollouts, "score.rollouts")
    if not config.score.output:
        raise InputError("config.score.output='' must be a folder for scores.jsonl and summary.json")
    output = pathlib.Path(config.score.output).expanduser()
    check_own(output, field="score.output", first="scores.jsonl", others=("summary.json",))
    return output


def rollouts_source(path: str, field: str, config) -> JsonlSource:
    """Opens a rollouts file with the further columns that roles show; InputError naming `field` if there is none."""
    _check_rollouts(path, field)
    return JsonlSource(pathlib.Path(path).expanduser(), fields=config.data.fields, views=view_columns(config))


def score_rollouts(
    session: Session, trained: Variables, config, *, teacher_params: Variables
) -> tuple[dict[str, Any], list[str]]:
    """Scores `config.score.rollouts` into `config.score.output`: scores.jsonl and summary.json.

    Args:
      teacher_params: what replaces or adapts the base for the teachers.

    Returns:
      (summary, one line per bad row with its line number in the file).

    Raises:
      InputError: no such file, or no usable row.
    """
    output = output_of(config)
    source = rollouts_source(config.score.rollouts, "score.rollouts", config)
    size = session.whole_batch(config.score.batch_size)
    objective = session.objective

    @jax.jit
    def run(
        base: Any, trained: Variables, teacher_params: Variables, others: Any, batch: Any
    ) -> tuple[TokenScores, RoleStats]:
        options = {"teacher_params": teacher_params, "others": others}
        scores = score_batch(session.model, base, trained, batch, objective, **options)
        return scores, role_stats(scores, batch.supervised, objective)

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot write to config.score.output={str(output)!r}: {e.strerror}; choose a folder") from e
    temporary = output / "scores.jsonl.tmp"
    zeros: Any = np.zeros(len(objective.roles))  # summed in float64 on the host
    totals = RoleStats(*[zeros] * len(dataclasses.fields(RoleStats)))
    bad, valid, bad_lines = Counter(), 0, []
    cases = read_cases(source, session, config)
    with temporary.open("w", encoding="utf-8") as file:
        for _ in bar(range(-(-len(source) // size)), title="score"):
            part = [case for _, case in zip(range(size), cases, strict=False)]
            slots = part + [Case(-1, Example(""))] * (size - len(part))
            batch = session.pack_scores([case.row for case in slots], [case.rollout for case in slots])
            scores, stats = jax.device_get(
                run(session.base, trained, teacher_params, session.others, session.put_batch(batch))
            )
            totals = jax.tree.map(lambda a, b: a + np.float64(b), totals, stats)
            for i, case in enumerate(part):
                if case.bad_reason:
                    bad[case.bad_reason] += 1
                    bad_lines.append(f"{source.path}:{source.line(case.index)}: {case.complaint}")
                else:
                    valid += case.scored.spans.is_valid
                supervised, own = jax.tree.map(lambda x, i=i: x[i], (batch.supervised, scores))
                file.write(json.dumps(_record(case, supervised, own, objective.roles)) + "\n")
    if len(source) == bad.total():
        temporary.unlink()
        reasons = ", ".join(f"{k} {n}" for k, n in bad.items())
        raise InputError(
            f"{source.path} has no usable row: {reasons} ({bad_lines[0]}); docs/data.md: see what a row needs"
        )
    summary = _summary(totals, objective) | {"rows": len(source), "valid_rows": valid, "bad_rows": dict(bad)}
    temporary.rename(output / "scores.jsonl")
    write_json(output / "summary.json", summary)
    return summary, bad_lines


def _record(
    case: Case, supervised: SupervisedTokens, scores: TokenScores, roles: tuple[TeacherRole, ...]
) -> dict[str, Any]:
    """The line of scores.jsonl."""
    if case.bad_reason:
        return {"id": case.example.id, "error": case.bad_reason}
    return {
        "id": case.example.id,
        "is_valid": case.scored.spans.is_valid,
        "completion_ids": list(case.scored.ids),
        "spans": spans_json(case.scored),
        **token_lists(case.scored, supervised, scores, roles),
    }


def _summary(totals: RoleStats, objective: ObjectiveConfig) -> dict[str, Any]:
    """The loss over all rollouts, and each role's."""
    losses = role_losses(totals, totals.normalizer)
    out: dict[str, Any] = {"loss": float(total_loss(totals, totals.normalizer, objective))}
    for r, role in enumerate(objective.roles):
        tokens = float(totals.tokens[r])
        out[role.name] = {
            "loss": float(losses[r]),
            "tokens": int(tokens),
            "clipped_fraction": float(totals.clipped_tokens[r] / max(tokens, 1.0)),
        }
        if role.token_weights != "uniform":
            out[role.name]["effective_tokens"] = tokens**2 / float(totals.squares[r]) if tokens else 0.0
    return out
