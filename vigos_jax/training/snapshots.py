"""Snapshots of a run: the same few rows, answered by the student of every so many steps and scored by the teachers."""

import contextlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from vigos_jax.analysis.score_rollouts import token_lists
from vigos_jax.data.examples import Example
from vigos_jax.data.images import BadImage
from vigos_jax.grading.answer_text import last_boxed
from vigos_jax.grading.rules import grade
from vigos_jax.method.batch import ScoreBatch
from vigos_jax.method.rows import Rollout, Row
from vigos_jax.method.scoring import score_batch
from vigos_jax.models.variables import Variables, teacher_params_of
from vigos_jax.report.page import image_uri
from vigos_jax.report.run_page import write_run_page
from vigos_jax.rollouts.engine import Engine
from vigos_jax.rollouts.parse import Reader, first_image, parse, pieces
from vigos_jax.rollouts.sample_rows import sample_rows
from vigos_jax.rollouts.sampler import row_keys
from vigos_jax.runtime import workdir as files
from vigos_jax.runtime.distributed import first_decides, is_first
from vigos_jax.runtime.files import finite_or_none
from vigos_jax.runtime.journal import Journal
from vigos_jax.runtime.sharding import replicated
from vigos_jax.session import Session
from vigos_jax.training.step import TrainState

_KEYS = 2**31 - 1  # the step index in the keys of snapshots, reserved: no training step reaches it


class Snapshots:
    """Appends to WORKDIR/report.jsonl and draws WORKDIR/report.html, every `config.report.every` steps and at the end.

    The first `config.report.rows` rows of the data are sampled as in training. On the demo they come from its
    evaluation, alternating between images that contradict the prior and images that agree with it. Their random keys
    are the same at every step and in every run, so only the student changes; training is not affected. In report.jsonl,
    the key `row/I` holds a question and `STEP/I` a response; a repeated step reuses its responses. All processes must
    construct it and call `at`.

    Args:
      engine: the run's engine. The rows fill the first places of an otherwise empty training batch, so that sampling
        compiles nothing new.
    """

    def __init__(self, config, session: Session, source: Any, engine: Engine, workdir: pathlib.Path):
        self._config, self._session, self._engine, self._workdir = config, session, engine, workdir
        rows = config.report.rows
        self._source = source.probes(count=rows, seed=config.demo_eval.seed) if rows else source
        self._file = workdir / files.SNAPSHOTS
        self._count = min(config.report.rows, config.batch_size, len(self._source))
        self._rows: list[tuple[Example, Row]] = []
        model, objective = session.model, session.objective

        def run(base: Any, trained: Variables, teacher_params: Variables, others: Any, batch: ScoreBatch) -> Any:
            options = {"teacher_params": teacher_params, "others": others}
            scores = score_batch(model, base, trained, batch, objective, **options)
            return batch.supervised, scores

        self._run = jax.jit(
            run, out_shardings=replicated(session.mesh)
        )  # small, and the first process writes all of it

    def at(self, step: int, state: TrainState) -> None:
        """Takes the snapshot of the student after `step` steps, if it is due and was not taken already."""
        if step % self._config.report.every and step != self._config.steps:
            return
        if self._count and not first_decides(lambda: self._has(step)):
            rollouts = self._answer(state.trained, step)
            scored = self._score(rollouts, state)
            if is_first():
                self._write(step, rollouts, scored)
        if is_first():
            write_run_page(self._workdir)

    def _has(self, step: int) -> bool:
        with Journal(self._file, keys_only=True) as journal:
            return all(f"{step}/{i}" in journal for i in range(self._count))

    def _probes(self) -> list[tuple[Example, Row]]:
        """The rows, read when they are first needed; a bad one has no prompt, and is never sampled or scored."""
        if not self._rows:
            reader = Reader.of(self._session, self._config)
            for i in range(self._count):
                example = reader.example(self._source, i, max_completion=self._config.sampling.max_tokens)
                self._rows.append((example, reader.row(example)))
        return self._rows

    def _answer(self, trained: Variables, step: int) -> list[Rollout | None]:
        """Every row's rollout, in every process."""
        rows = [row for _, row in self._probes()]
        keys = row_keys(self._config.demo_eval.seed, _KEYS, self._config.batch_size)
        self._engine.sync(trained, step=step)
        return parse(self._session, rows, sample_rows(self._engine, self._session, rows, keys))

    def _score(self, rollouts: Sequence[Rollout | None], state: TrainState) -> list[dict[str, Any]]:
        """Per row, lists over the tokens as in scores.jsonl."""
        session, size = self._session, self._session.whole_batch(self._count)
        empty = size - self._count
        rows, rollouts = [row for _, row in self._probes()] + [Row()] * empty, [*rollouts, *[None] * empty]
        own = session.own_rows(size)
        batch = session.pack_scores([rows[i] for i in own], [rollouts[i] for i in own])
        teacher_params = teacher_params_of(self._config.teacher.weights, trained=state.trained, average=state.average)
        supervised, scores = jax.device_get(
            self._run(session.base, state.trained, teacher_params, session.others, session.put_batch(batch))
        )
        return [
            token_lists(rollout, _row(supervised, i), _row(scores, i), session.roles) if rollout else {}
            for i, rollout in enumerate(rollouts[: self._count])
        ]

    def _write(self, step: int, rollouts: Sequence[Rollout | None], scored: Sequence[Mapping[str, Any]]) -> None:
        with Journal(self._file, keys_only=True) as journal:
            for i, (example, _) in enumerate(self._probes()):
                if f"row/{i}" not in journal:
                    journal.append(f"row/{i}", {"row": i} | self._asked(i, example))
                if f"{step}/{i}" not in journal:
                    rollout = rollouts[i]
                    response = self._response(i, example, rollout, scored[i]) if rollout else {}
                    journal.append(f"{step}/{i}", {"step": step, "row": i} | response)
            journal.sync()

    def _asked(self, i: int, example: Example) -> dict[str, Any]:
        out = {"id": example.id, "problem": example.problem, "reference": example.reference}
        out |= {"bad_reason": example.bad_reason, "picture": ""}
        if example.bad_reason is None and example.images:
            with contextlib.suppress(BadImage):  # it was there a moment ago
                out["picture"] = image_uri(first_image(self._source, i))
        return out

    def _response(self, i: int, example: Example, rollout: Rollout, scored: Mapping[str, Any]) -> dict[str, Any]:
        session, spans = self._session, rollout.spans
        answer = last_boxed(session.processor.decode(rollout.ids))
        description = session.processor.decode(rollout.ids[slice(*spans.description)])
        lists = {k: [_rounded(x) for x in scored[k]] for k in ("kl", "student_logp", "teacher_logp")}
        return {
            "completion_ids": list(rollout.ids),
            "tokens": pieces(session, rollout.ids),
            "role": scored["role"],
            **lists,
            "answer": answer,
            "is_valid": spans.is_valid,
            "invalid_reason": spans.invalid_reason,
            "is_correct": grade(answer, example.reference).is_correct,
            "is_leaky": spans.is_valid and self._source.is_leaky(i, description, answer),
        }


def _row(struct: Any, i: int) -> Any:
    """Row i of arrays with a batch axis."""
    return jax.tree.map(lambda x: x[i], struct)


def _rounded(x: float | None) -> float | None:
    return None if x is None else finite_or_none(round(x, 5))
