"""`--mode score`: the objective on rollouts made by any engine, token by token, without an optimizer."""

import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from vigos_jax.data import JsonlSource, encode_row
from vigos_jax.errors import InputError
from vigos_jax.loading import Loaded
from vigos_jax.losses import EntryScores, RoleStats, clip_kl, role_losses, role_stats
from vigos_jax.metrics import bar, write_json
from vigos_jax.models.variables import Variables
from vigos_jax.packing import Rollout, Row, make_row, pack_scores, too_long
from vigos_jax.processor import Processor
from vigos_jax.roles import roles_per_token
from vigos_jax.score import score_batch
from vigos_jax.spans import find_spans


@dataclasses.dataclass(frozen=True)
class _Line:
    """One line of the rollouts file: ready to score, or with the reason why not."""

    id: str
    row: Row = Row()
    rollout: Rollout | None = None
    bad_reason: str | None = None


def _completion_ids(raw: dict[str, Any], processor: Processor, vocab_size: int) -> list[int] | str:
    """Token ids of a row's completion, or the reason why there are none."""
    ids = raw.get("completion_ids")
    if ids is None:
        text = raw.get("completion")
        return processor.encode_text(text) if isinstance(text, str) else "no_completion"
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        return "bad_completion_ids"
    return ids


def _read(source: JsonlSource, loaded: Loaded, config) -> Iterator[_Line]:
    roots = (*source.image_roots, "/")  # the rollouts' own engine chose the paths
    for i in range(len(source)):
        raw = source[i]
        options = {"processor": loaded.processor, "max_images": config.data.max_images, "image_roots": roots}
        example = encode_row(raw, i, **options)
        reason = example.bad_reason
        if reason is None:
            ids = _completion_ids(raw, loaded.processor, loaded.config.vocab_size)
            reason = ids if isinstance(ids, str) else None
        if reason is None and len(ids) > max(loaded.buckets.completion):
            reason = "completion_too_long"
        if reason is None:
            row = make_row(
                example.images,
                problem=example.problem,
                reference=example.reference,
                student=config.prompts.student,
                roles=loaded.roles,
                processor=loaded.processor,
            )
            kind = too_long(
                row, roles=loaded.roles, buckets=loaded.buckets, max_completion=len(ids), config=loaded.config
            )
            reason = kind and f"{kind}_too_long"
        if reason is not None:
            yield _Line(example.id, bad_reason=reason)
        else:
            yield _Line(example.id, row, Rollout(tuple(ids), find_spans(loaded.processor.token_bytes(ids))))


def _token_lists(line: _Line, entries: dict[str, np.ndarray], loaded: Loaded) -> dict[str, Any]:
    """Per-token lists of one row from its entries; of roles that score a token twice, the table's first is shown."""
    n = len(line.rollout.ids)
    fields = ("kl", "kl_clipped", "student_logp", "teacher_logp")
    out: dict[str, Any] = {"role": [None] * n} | {f: [None] * n for f in fields}
    by_role = {r.name: {f: [None] * n for f in fields} for r in loaded.roles}
    for e in np.flatnonzero(entries["role"] >= 0):
        j, name = int(entries["position"][e]), loaded.roles[entries["role"][e]].name
        for f in fields:
            by_role[name][f][j] = float(entries[f][e])
        if out["role"][j] is None:
            out["role"][j] = name
            for f in fields:
                out[f][j] = float(entries[f][e])
    if roles_per_token(loaded.roles) > 1:
        out["by_role"] = by_role
    return out


def score_rollouts(loaded: Loaded, trained: Variables, config) -> tuple[dict[str, Any], list[str]]:
    """Scores `config.score.rollouts` into `config.score.output`: scores.jsonl and summary.json.

    Returns:
      (summary, one line per bad row with its number in the file's rows, counted from 1).

    Raises:
      InputError: no such file, or no usable row.
    """
    path = pathlib.Path(config.score.rollouts).expanduser()
    if not config.score.rollouts or not path.is_file():
        raise InputError(f"config.score.rollouts={config.score.rollouts!r} must be a .jsonl file of rollouts")
    if not config.score.output:
        raise InputError("config.score.output='' must be a folder for scores.jsonl and summary.json")
    output = pathlib.Path(config.score.output).expanduser()
    source = JsonlSource(path)
    ways = loaded.mesh.shape["data"] * loaded.mesh.shape["fsdp"]
    size = -(-config.score.batch_size // ways) * ways
    roles = loaded.roles

    @jax.jit
    def run(base: Any, trained: Variables, batch: Any) -> tuple[EntryScores, RoleStats, Any]:
        scores = score_batch(loaded.model, base, trained, batch, roles=roles, chunk=config.loss.chunk)
        role = jax.numpy.maximum(batch.entries.role, 0)
        return scores, role_stats(scores, batch.entries, roles=roles), clip_kl(scores.kl, role, roles)

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot write to config.score.output={str(output)!r}: {e.strerror}; choose a folder") from e
    temporary = output / "scores.jsonl.tmp"
    totals = RoleStats(*(np.zeros(len(roles)) for _ in range(3)))
    bad, valid, rows, bad_lines = Counter(), 0, 0, []
    lines = _read(source, loaded, config)
    with temporary.open("w", encoding="utf-8") as file:
        for _ in bar(range(-(-len(source) // size)), title="score"):
            part = [line for _, line in zip(range(size), lines, strict=False)]
            padding = [_Line("")] * (size - len(part))
            batch = pack_scores(
                [line.row for line in part + padding],
                [line.rollout for line in part + padding],
                roles=roles,
                config=loaded.config,
                buckets=loaded.buckets,
            )
            scores, stats, clipped = jax.device_get(run(loaded.base, trained, loaded.put_batch(batch)))
            totals = jax.tree.map(lambda a, b: a + np.float64(b), totals, stats)
            for i, line in enumerate(part):
                rows += 1
                if line.bad_reason:
                    bad[line.bad_reason] += 1
                    bad_lines.append(f"{path}: row {rows} (id {line.id}): {line.bad_reason}")
                    file.write(json.dumps({"id": line.id, "error": line.bad_reason}) + "\n")
                    continue
                spans = line.rollout.spans
                valid += spans.is_valid
                entries = {k: getattr(batch.entries, k)[i] for k in ("role", "position")}
                entries |= {k: getattr(scores, k)[i] for k in ("kl", "student_logp", "teacher_logp")}
                entries["kl_clipped"] = clipped[i]
                record = {
                    "id": line.id,
                    "is_valid": spans.is_valid,
                    "completion_ids": list(line.rollout.ids),
                    "spans": {
                        name: [list(span)] if span[1] > span[0] else []
                        for name in ("description", "reasoning", "answer")
                        for span in (getattr(spans, name),)
                    },
                    **_token_lists(line, entries, loaded),
                }
                file.write(json.dumps(record) + "\n")
    if rows == sum(bad.values()):
        temporary.unlink()
        raise InputError(f"{path} has no usable row: " + ", ".join(f"{k} {n}" for k, n in bad.items()))
    losses = role_losses(totals, totals.tokens)
    summary: dict[str, Any] = {"loss": float(sum(r.weight * x for r, x in zip(roles, losses, strict=True)))}
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
