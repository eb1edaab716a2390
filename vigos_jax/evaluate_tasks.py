"""`--mode eval`: answers to benchmark questions, sampled once, graded by rules, summed up. Resumable at any point."""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vigos_jax.data import row_size
from vigos_jax.graders import last_boxed
from vigos_jax.images import BadImage, image_bytes, read_image
from vigos_jax.journal import Journal, content_key
from vigos_jax.judge import PROMPT, Item, Judge
from vigos_jax.loading import Loaded
from vigos_jax.math_grader import MathGrader
from vigos_jax.metrics import Progress, bar, say, write_json
from vigos_jax.models.variables import Variables
from vigos_jax.packing import Row, make_row, pack_prompts, slot_count
from vigos_jax.prompts import fill
from vigos_jax.sampler import Sampler, Sampling
from vigos_jax.spans import find_spans
from vigos_jax.task_rows import TaskRows, open_rows, questions_of
from vigos_jax.task_scores import COMMON, Answer, summarise
from vigos_jax.tasks import find_task
from vigos_jax.tasks.task import Question, Task

_WIDTHS = (10, 8, 8, 17, 9, 8, 7, 8)  # of the table's columns
GRADING = 1  # raised when the rules change: verdicts of other rules are not reused
_ANSWER_IS = re.compile(r"(?:answer|option)(?: is)?[: ]+\**([^\n]{1,200})", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Job:
    """One answer to sample: a question, which of its samples, and the key of its content."""

    question: Question
    sample: int
    key: str


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A task's numbers and answers; `errors` are questions that could not be asked, with the reason."""

    task: Task
    source: str
    numbers: dict[str, Any]
    answers: list[Answer]
    errors: list[tuple[Question, str]]
    notes: list[str]
    image_roots: tuple[str, ...]


def evaluate_tasks(
    loaded: Loaded, variables: Variables, config, *, output: pathlib.Path, fingerprint: str
) -> list[TaskResult]:
    """Runs `config.eval` on a student, and writes responses.jsonl, verdicts.jsonl and results.json into `output`.

    Args:
      variables: what the model is applied with, from `loaded.student`.
      fingerprint: tells this model's answers from any other's.

    Raises:
      InputError: an unknown task, a source that cannot be read or lacks columns. Nothing written is lost.
    """
    e = config.eval
    tasks = [find_task(name) for name in e.tasks]
    # All sources are opened before the first answer is sampled.
    options = {"demo_questions": e.demo_questions, "seed": e.seed}
    opened = [(task, open_rows(task, e.sources.get(task.name, ""), **options)) for task in tasks]
    judge = _open_judge(e.judge)
    sampler = Sampler(
        loaded.model,
        Sampling(max_tokens=e.max_tokens, temperature=e.temperature, top_k=e.top_k, top_p=e.top_p),
        eos_ids=loaded.processor.eos_ids,
        cache_sizes=loaded.buckets.completion,
    )
    variables = sampler.ready(variables)
    results = []
    with Journal(output / "responses.jsonl") as responses, Journal(output / "verdicts.jsonl") as verdicts:
        for task, rows in opened:
            asking = _Asking(loaded, config, sampler, fingerprint, task, rows)
            jobs, errors = asking.jobs(questions_of(task, rows, limit=e.limit))
            errors += asking.sample(variables, jobs, responses)
            responses.sync()
            with MathGrader() as math:
                answers = [
                    _grade(task, job, responses[job.key], verdicts, math) for job in jobs if job.key in responses
                ]
            if judge is not None:
                answers = _judged(answers, judge, verdicts, mode=e.judge.mode)
            notes = []
            if task.rows is not None and not e.limit and len(rows.rows) != task.rows:
                notes.append(f"{rows.name} has {len(rows.rows)} rows; {task.title} is published with {task.rows}")
            numbers = summarise(task, answers, seed=e.seed) | {"errors": len(errors)}
            results.append(TaskResult(task, rows.name, numbers, answers, errors, notes, rows.image_roots))
            for note in notes:
                say(note)
    write_json(
        output / "results.json",
        {r.task.name: r.numbers | {"source": r.source, "notes": r.notes} for r in results},
    )
    return results


@dataclasses.dataclass(frozen=True)
class _Asking:
    """Samples one task's answers."""

    loaded: Loaded
    config: Any
    sampler: Sampler
    fingerprint: str
    task: Task
    rows: TaskRows

    def prompt(self) -> Mapping[str, str]:
        e = self.config.eval
        plain = {"user": e.plain_prompt, "assistant_prefill": ""}
        return self.config.prompts.student if e.prompt == "structured" else plain

    def jobs(self, questions: Sequence[Question]) -> tuple[list[Job], list[tuple[Question, str]]]:
        """Every answer to be had, with its key; and the questions that cannot be asked."""
        e, prompt = self.config.eval, self.prompt()
        samples = self.task.samples or e.samples
        how = dataclasses.asdict(self.sampler.sampling) | {"seed": e.seed}
        jobs, errors = [], []
        for question in questions:
            try:
                if question.error:
                    raise _CannotAsk(question.error)
                pictures = [
                    hashlib.sha256(image_bytes(item, image_roots=self.rows.image_roots)).hexdigest()
                    for item in question.images
                ]
            except (_CannotAsk, BadImage) as error:
                errors.append((question, getattr(error, "kind", str(error))))
                continue
            text = [fill(prompt["user"], problem=question.text), prompt["assistant_prefill"]]
            for sample in range(samples):
                key = content_key(self.fingerprint, self.task.name, question.id, text, pictures, how, sample)
                jobs.append(Job(question, sample, key))
        return jobs, errors

    def sample(self, variables: Variables, jobs: Sequence[Job], responses: Journal) -> list[tuple[Question, str]]:
        """Answers what is not answered yet; returns the questions that turned out not to be askable."""
        pending = [job for job in jobs if job.key not in responses]
        if len(pending) < len(jobs):
            say(f"{self.task.name}: {len(jobs) - len(pending)} of {len(jobs)} answers are there already")
        sizes = {job.question.id: self._size(job.question) for job in pending}
        pending.sort(key=lambda job: sizes[job.question.id])  # rows of a batch need about the same padding
        size = self.loaded.whole_batch(self.config.eval.batch_size)
        batches = [pending[i : i + size] for i in range(0, len(pending), size)]
        progress = Progress(total=len(batches), start=0, title=f"eval {self.task.name}", every=self.config.log_every)
        errors: dict[str, tuple[Question, str]] = {}
        for number, (batch, rows) in enumerate(self._read_ahead(batches), start=1):
            start = time.monotonic()
            good = [(job, row) for job, row in zip(batch, rows, strict=True) if isinstance(row, Row)]
            errors |= {
                job.question.id: (job.question, row)
                for job, row in zip(batch, rows, strict=True)
                if not isinstance(row, Row)
            }
            if good:
                self._sample_batch(variables, good, size, responses)
            progress.update(number, {"answers/s": len(good) / (time.monotonic() - start)})
        progress.close()
        return list(errors.values())

    def _read_ahead(self, batches: Sequence[Sequence[Job]]) -> Iterator[tuple[Sequence[Job], list[Row | str]]]:
        """Each batch with its rows; the next one is read while this one is sampled."""
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            upcoming = None
            for i, batch in enumerate(batches):
                rows = (upcoming or reader.submit(self._rows, batch)).result()
                upcoming = reader.submit(self._rows, batches[i + 1]) if i + 1 < len(batches) else None
                yield batch, rows

    def _rows(self, batch: Sequence[Job]) -> list[Row | str]:
        made: dict[str, Row | str] = {}
        for job in batch:
            if job.question.id not in made:
                made[job.question.id] = self._row(job.question)
        return [made[job.question.id] for job in batch]

    def _row(self, question: Question) -> Row | str:
        """The question as the model reads it, or why it cannot."""
        loaded = self.loaded
        try:
            images = tuple(
                loaded.processor.encode_image(read_image(item, image_roots=self.rows.image_roots))
                for item in question.images
            )
        except BadImage as e:
            return e.kind
        row = make_row(
            images, problem=question.text, reference="", student=self.prompt(), roles=(), processor=loaded.processor
        )
        for kind, n in (("patches", slot_count(row, loaded.config)), ("prompt", len(row.student.ids))):
            if n > max(getattr(loaded.buckets, kind)):
                return f"{kind}_too_long"
        return row

    def _size(self, question: Question) -> int:
        row = {"images": list(question.images), "problem": question.text}
        return row_size(row, processor=self.loaded.processor, image_roots=self.rows.image_roots)

    def _sample_batch(
        self, variables: Variables, good: Sequence[tuple[Job, Row]], size: int, responses: Journal
    ) -> None:
        loaded, e = self.loaded, self.config.eval
        rows = [row for _, row in good] + [Row()] * (size - len(good))
        prompts = loaded.put_batch(pack_prompts(rows, config=loaded.config, buckets=loaded.buckets))
        # By question and sample, not by place: the same answer whatever is sampled beside it.
        names = [f"{self.task.name}/{job.question.id}/{job.sample}" for job, _ in good] + [""] * (size - len(good))
        sampled = self.sampler(variables, prompts, named_keys(e.seed, names))
        for (job, _), ids in zip(good, sampled.ids, strict=False):
            text = loaded.processor.decode([i for i in ids if i not in loaded.processor.eos_ids])
            spans = find_spans(loaded.processor.token_bytes(ids), rule=loaded.span_rule)
            responses.append(
                job.key,
                {
                    "task": self.task.name,
                    "id": job.question.id,
                    "sample": job.sample,
                    "text": text,
                    "tokens": len(ids),
                    "is_valid": spans.is_valid if e.prompt == "structured" else last_boxed(text) is not None,
                    "is_truncated": not ids or ids[-1] not in loaded.processor.eos_ids,
                },
            )


class _CannotAsk(Exception):
    """The question has no text, no picture or no answer."""


def named_keys(seed: int, names: Sequence[str]) -> jax.Array:
    """One random key per name: a function of seed and name alone."""
    numbers = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") for name in names]
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.array(numbers, np.uint32))


def lenient_answer(text: str) -> str | None:
    """What a reader takes for the answer: the last box, else what follows the last "answer is", else the last line."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    said = _ANSWER_IS.findall(text)
    if said:
        return said[-1].strip(" *.")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None


def _grade(task: Task, job: Job, response: Mapping[str, Any], verdicts: Journal, math: MathGrader) -> Answer:
    """The answer with its verdict, a stored one if the same answer was graded by the same rules."""
    question, text = job.question, response["text"]
    boxed, lenient = last_boxed(text), lenient_answer(text)
    known = content_key(GRADING, task.name, question.reference, question.options, question.precision, boxed, lenient)
    if known not in verdicts:
        strict = task.grade(question, boxed, math)
        loose = strict if lenient == boxed else task.grade(question, lenient, math)
        record = {"answer": boxed, "is_correct": strict.is_correct, "grader": strict.grader}
        verdicts.append(known, record | {"is_correct_leniently": loose.is_correct})
    v = verdicts[known]
    return Answer(
        question=question,
        sample=job.sample,
        text=text,
        answer=boxed,
        is_correct=v["is_correct"],
        grader=v["grader"],
        is_correct_leniently=v["is_correct_leniently"],
        tokens=response["tokens"],
        is_valid=response["is_valid"],
        is_truncated=response["is_truncated"],
    )


def _open_judge(settings) -> Judge | None:
    """The judge of `config.eval.judge`, found to be there; None for "off"."""
    if settings.mode == "off":
        return None
    judge = Judge(**{k: v for k, v in settings.items() if k != "mode"})
    judge.check()
    return judge


def _judged(answers: Sequence[Answer], judge: Judge, verdicts: Journal, *, mode: str) -> list[Answer]:
    """The answers with the judge's verdicts, stored ones where there are any; None where its call failed."""
    asked: dict[str, Item] = {}
    keys: list[str | None] = []
    for a in answers:
        is_asked = bool(a.text.strip()) and (mode == "always" or not a.is_correct)
        item = Item(a.question.text, a.question.reference, a.answer or a.text)
        key = content_key("judge", judge.model, PROMPT, item.shown())
        keys.append(key if is_asked else None)
        if is_asked and key not in verdicts:
            asked[key] = item
    numbered = list(asked)
    for number, is_right in bar(judge.verdicts(list(asked.values())), title="judge"):
        verdicts.append(numbered[number], {"is_correct": is_right, "grader": "judge"})
    out = []
    for a, key in zip(answers, keys, strict=True):
        if key is not None:
            said = verdicts[key]["is_correct"] if key in verdicts else None
            a = dataclasses.replace(a, is_correct=said, grader="judge")
        out.append(a)
    return out


def fingerprint_of(folders: Sequence[pathlib.Path], *facts: Any) -> str:
    """A short text that changes with the files of these folders and with `facts`; large files are read in part."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder)} {size}".encode())
            with path.open("rb") as file:
                for place in sorted({0, *(size * i // 16 // 4096 * 4096 for i in range(1, 16)), max(0, size - 4096)}):
                    file.seek(place)
                    digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def table_text(results: Sequence[TaskResult]) -> str:
    """The numbers for a terminal, a line per task."""
    head = ("questions", "pass", "avg", "95 % interval", "lenient", "valid", "cut", "tokens")
    lines = [" " * 26 + "".join(f"{name:>{width}}" for name, width in zip(head, _WIDTHS, strict=True))]
    for r in results:
        n = r.numbers
        spread = f"{n['avg_low']:.2f} - {n['avg_high']:.2f}"
        cells = [f"{n['questions']}", f"{n['pass']:.2f}", f"{n['avg']:.2f}", spread, f"{n['avg_lenient']:.2f}"]
        cells += [f"{n['format_valid']:.1f}", f"{n['truncated']:.1f}", f"{n['tokens']:.0f}"]
        lines.append(f"{r.task.title:26}" + "".join(f"{c:>{w}}" for c, w in zip(cells, _WIDTHS, strict=True)))
        own = "  ".join(f"{k} {v:.2f}" for k, v in n.items() if k not in COMMON and isinstance(v, float))
        lines += [f"    {own}"] if own else []
        lines += [f"    {len(r.errors)} question(s) could not be asked"] if r.errors else []
        lines += [f"    {n['unjudged']} answer(s) still to be judged"] if n["unjudged"] else []
    return "\n".join(lines)


