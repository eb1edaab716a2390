"""Samples answers to a task's questions on the mesh. They are stored by content key, and never sampled twice.

With several processes, each samples the rows that its own devices hold; the first one stores the answers.
"""

import concurrent.futures
import dataclasses
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vigos_jax.data.examples import row_size
from vigos_jax.data.images import BadImage, image_bytes, image_size
from vigos_jax.data.processor import PixelLimits
from vigos_jax.data.visuals import Outline, TooLong, Visual
from vigos_jax.evaluation.questions import TaskRows
from vigos_jax.evaluation.tasks.task import Question, Task
from vigos_jax.grading.answer_text import last_boxed
from vigos_jax.method.prompts import fill
from vigos_jax.method.rows import Row
from vigos_jax.method.spans import find_spans
from vigos_jax.rollouts.engine import Engine
from vigos_jax.rollouts.parse import FAILED, prompt_pixels, prompt_row
from vigos_jax.rollouts.sample_rows import sample_rows
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.runtime.distributed import exchange, first_decides
from vigos_jax.runtime.journal import Journal, content_key
from vigos_jax.runtime.progress import Progress, say
from vigos_jax.session import Session


@dataclasses.dataclass(frozen=True)
class Job:
    """One answer to sample: a question, which of its samples, and the key of its content."""

    question: Question
    sample: int
    key: str


@dataclasses.dataclass(frozen=True)
class Asker:
    """Samples one task's answers with the student that the engine has.

    Attributes:
      sampling: how the engine samples.
      fingerprint: tells this student's answers from any other's.
    """

    session: Session
    config: Any
    engine: Engine
    sampling: Sampling
    fingerprint: str
    task: Task
    rows: TaskRows

    def _prompt(self) -> Mapping[str, str]:
        e = self.config.eval
        plain = {"user": e.plain_prompt, "assistant_prefill": ""}
        return self.config.prompts.student.to_dict() if e.prompt == "structured" else plain

    def jobs(self, questions: Sequence[Question]) -> tuple[list[Job], list[tuple[Question, str]]]:
        """Returns (a job per answer needed, the questions that cannot be asked with the reason)."""
        e, prompt = self.config.eval, self._prompt()
        # Greedy answers to one question are equal.
        samples = self.task.samples or (e.samples if e.temperature else 1)
        how = dataclasses.asdict(self.sampling) | {"seed": e.seed, "span_rule": self.session.span_rule}
        jobs, errors = [], []
        for question in questions:
            reason, images, pixels = question.error, [], (0, 0)
            try:
                for item in question.images:
                    data = image_bytes(item, image_roots=self.rows.image_roots)
                    images.append(hashlib.sha256(data).hexdigest())
                pixels = self._pixels(question)
            except (BadImage, TooLong) as error:
                reason = reason or error.kind
            if reason:
                errors.append((question, reason))
                continue
            text = [fill(prompt["user"], problem=question.text), prompt["assistant_prefill"]]
            for sample in range(samples):
                key = content_key(self.fingerprint, self.task.name, question.id, text, images, pixels, how, sample)
                jobs.append(Job(question, sample, key))
        return jobs, errors

    def _pixels(self, question: Question) -> tuple[int, int]:
        """(least, most) pixel limits for the question's images, part of the key; reads image headers only."""
        outlines = [Outline(image_size(item, image_roots=self.rows.image_roots)) for item in question.images]
        options = {"problem": question.text, "student": self._prompt()}
        limits = prompt_pixels(outlines, self.session, self.config, **options)
        return limits.least, limits.most

    def sample(self, jobs: Sequence[Job], responses: Journal | None) -> list[tuple[Question, str]]:
        """Samples the missing answers; returns the questions that turned out to be unusable, with the reason.

        Args:
          responses: the stored answers; None except in the first process.
        """
        there = set(first_decides(lambda: [job.key for job in jobs if responses is not None and job.key in responses]))
        pending = [job for job in jobs if job.key not in there]
        if there:
            say(f"{self.task.name}: {len(jobs) - len(pending)} of {len(jobs)} answers are there already")
        sizes = {job.question.id: self._size(job.question) for job in pending}
        pending.sort(key=lambda job: sizes[job.question.id])  # rows of a batch need about the same padding
        size = self.session.whole_batch(self.config.eval.batch_size)
        batches = [pending[i : i + size] for i in range(0, len(pending), size)]
        progress = Progress(total=len(batches), start=0, title=f"eval {self.task.name}", every=self.config.log_every)
        errors: dict[str, tuple[Question, str]] = {}
        for number, (batch, rows) in enumerate(self._read_ahead(batches, size), start=1):
            start = time.monotonic()
            for job, answer in zip(batch, self._sample_batch(batch, rows, size), strict=True):
                if isinstance(answer, str):
                    errors[job.question.id] = (job.question, answer)
                elif responses is not None:
                    responses.append(job.key, self._record(job, answer))
            progress.update(number, {"answers/s": len(batch) / (time.monotonic() - start)})
        progress.close()
        if responses is not None:
            responses.sync()
        return list(errors.values())

    def _read_ahead(
        self, batches: Sequence[Sequence[Job]], size: int
    ) -> Iterator[tuple[Sequence[Job], dict[int, Row | str]]]:
        """Each batch with this process's rows of it; the next one is read while this one is sampled."""
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            upcoming = None
            for i, batch in enumerate(batches):
                rows = (upcoming or reader.submit(self._rows, batch, size)).result()
                upcoming = reader.submit(self._rows, batches[i + 1], size) if i + 1 < len(batches) else None
                yield batch, rows

    def _rows(self, batch: Sequence[Job], size: int) -> dict[int, Row | str]:
        """This process's rows by their place in a batch of `size`; after the last job they are empty."""
        made: dict[str, Row | str] = {}
        rows: dict[int, Row | str] = {}
        for i in self.session.own_rows(size):
            if i >= len(batch):
                rows[i] = Row()
                continue
            question = batch[i].question
            if question.id not in made:
                made[question.id] = self._row(question)
            rows[i] = made[question.id]
        return rows

    def _row(self, question: Question) -> Row | str:
        """The question as the model reads it, or why it cannot."""
        try:
            visuals = [Visual.read(item, image_roots=self.rows.image_roots) for item in question.images]
            return prompt_row(visuals, self.session, self.config, problem=question.text, student=self._prompt())
        except (BadImage, TooLong) as e:
            return e.kind

    def _size(self, question: Question) -> int:
        row = {"images": list(question.images), "problem": question.text}
        pixels = PixelLimits(self.config.data.min_pixels, self.config.data.max_pixels)
        return row_size(row, processor=self.session.processor, image_roots=self.rows.image_roots, pixels=pixels)

    def _sample_batch(self, batch: Sequence[Job], rows: Mapping[int, Row | str], size: int) -> list[list[int] | str]:
        """Token ids of each job's answer, or why it could not be asked; the same in all processes."""
        errors = dict(
            pair for pairs in exchange([(i, row) for i, row in rows.items() if isinstance(row, str)]) for pair in pairs
        )
        asked = [row if isinstance(row := rows.get(i), Row) else Row() for i in range(size)]
        # Keys depend on question and sample, not on batch position: answers do not depend on the batch.
        names = [f"{self.task.name}/{job.question.id}/{job.sample}" for job in batch] + [""] * (size - len(batch))
        sampled = sample_rows(self.engine, self.session, asked, named_keys(self.config.eval.seed, names))
        errors = {i: FAILED for i in range(len(batch)) if sampled.failure(i) is not None} | errors
        return [errors.get(i, list(sampled.ids[i])) for i in range(len(batch))]

    def _record(self, job: Job, ids: Sequence[int]) -> dict[str, Any]:
        """What is kept of an answer."""
        processor = self.session.processor
        text = processor.decode([i for i in ids if i not in processor.eos_ids])
        if self.config.eval.prompt == "structured":
            is_valid = find_spans(processor.token_bytes(ids), rule=self.session.span_rule).is_valid
        else:
            is_valid = last_boxed(text) is not None
        return {
            "task": self.task.name,
            "id": job.question.id,
            "sample": job.sample,
            "text": text,
            "tokens": len(ids),
            "is_valid": is_valid,
            "is_truncated": not ids or ids[-1] not in processor.eos_ids,
        }


def named_keys(seed: int, names: Sequence[str]) -> jax.Array:
    """One random key per name: a function of seed and name alone."""
    digests = (hashlib.sha256(name.encode("utf-8", "backslashreplace")).digest() for name in names)
    numbers = [int.from_bytes(digest[:4], "little") for digest in digests]
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.array(numbers, np.uint32))
