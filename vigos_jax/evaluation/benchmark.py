"""Benchmarks: answers to their questions, sampled once, graded by rules and a judge, summed up. Resumable."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vigos_jax.errors import InputError
from vigos_jax.evaluation.answers import Asker, Job
from vigos_jax.evaluation.questions import TaskRows, open_rows, questions_of
from vigos_jax.evaluation.statistics import Answer, interval_text, number_text, own_numbers, summarise, why_nothing
from vigos_jax.evaluation.tasks import find_task
from vigos_jax.evaluation.tasks.task import Question, Task
from vigos_jax.grading.algebra import MathGrader
from vigos_jax.grading.answer_text import last_boxed
from vigos_jax.grading.judge import PROMPT, Item, Judge
from vigos_jax.models.variables import Variables
from vigos_jax.rollouts.engine import EngineFactory, NativeEngine
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.runtime import workdir as files
from vigos_jax.runtime.digest import digests
from vigos_jax.runtime.distributed import is_first
from vigos_jax.runtime.files import check_own
from vigos_jax.runtime.journal import Journal, content_key
from vigos_jax.runtime.lock import held
from vigos_jax.runtime.progress import Progress, say
from vigos_jax.session import Session

_RESPONSES, _VERDICTS = "responses.jsonl", "verdicts.jsonl"
WRITTEN = ("results.json", "report.md", "report.html")  # after all is answered, each time anew
_WIDTHS = (10, 8, 8, 17, 9, 8, 7, 8)  # of the table's columns
GRADING = 4  # raised when the rules change: verdicts of other rules are not reused
# Files of a model folder that affect its answers: weights, configs, tokenizer, chat template and processor.
_ANSWER_FILES = (
    *("model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "*.model", "chat_template.json", "chat_template.jinja"),
    *("additional_chat_templates/*.jinja", "*processor_config.json"),
)
_ANSWER_IS = re.compile(r"(?:answer|option)(?: is:?|:)[ *]*([^\n]{1,200})", re.IGNORECASE)


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


class Evaluation:
    """An evaluation by `config.eval`: opened sources, a reachable judge, a sampler compiled once for all students.

    With several processes, all construct and run it; only the first one writes files, grades and returns results.

    Raises:
      InputError: an unknown task, a source that cannot be read or lacks columns, a judge that cannot be reached.
    """

    def __init__(self, session: Session, config, *, open_engine: EngineFactory = NativeEngine):
        e = config.eval
        tasks = [find_task(name) for name in dict.fromkeys(e.tasks)]
        if not tasks:
            raise InputError("config.eval.tasks=() must name a task")
        options = {"demo_questions": e.demo_questions, "seed": e.seed}
        self._opened = [(task, open_rows(task, e.sources.get(task.name, ""), **options)) for task in tasks]
        self._judge = _open_judge(e.judge) if is_first() else None
        self._sampling = Sampling(max_tokens=e.max_tokens, temperature=e.temperature, top_k=e.top_k, top_p=e.top_p)
        self._engine = open_engine(session, self._sampling)
        self._session, self._config = session, config
        kind = config.model.quantization
        self._base = fingerprint_of(session.folder, config.model.dtype, *(() if kind == "none" else (kind,)))

    def fingerprint(self, trained: Variables) -> str:
        """Tells a student from any other: its base's files, and the bits of what was trained."""
        spec = self._session.model.lora if "lora" in trained else None
        adapter = [spec.rank, spec.scale, sorted(spec.language), sorted(spec.vision)] if spec else []
        return content_key(self._base, adapter, digests(trained))

    def run(self, trained: Variables, *, output: pathlib.Path) -> list[TaskResult]:
        """Evaluates a student; appends missing answers and verdicts to responses.jsonl and verdicts.jsonl in `output`.

        Args:
          trained: as `Session.student` takes it.

        Returns:
          A result per task; none in all processes but the first.

        Raises:
          InputError: nowhere to write, or another run is writing there. Nothing written is lost.
        """
        fingerprint = self.fingerprint(trained)
        self._engine.sync(trained)
        results = []
        with held(output), _journals(output) as (responses, verdicts):
            for task, rows in self._opened:
                asker = Asker(self._session, self._config, self._engine, self._sampling, fingerprint, task, rows)
                jobs, errors = asker.jobs(questions_of(task, rows, limit=self._config.eval.limit))
                errors += asker.sample(jobs, responses)
                if responses is not None and verdicts is not None:
                    results.append(self._result(task, rows, jobs, errors, responses, verdicts))
        return results

    def close(self) -> None:
        """Closes the engine."""
        self._engine.close()

    def _result(
        self,
        task: Task,
        rows: TaskRows,
        jobs: Sequence[Job],
        errors: list[tuple[Question, str]],
        responses: Journal,
        verdicts: Journal,
    ) -> TaskResult:
        e = self._config.eval
        with MathGrader() as math:
            known = [(job, response) for job in jobs if job.key in responses and (response := responses[job.key])]
            answers = [_grade(task, job, response, verdicts, math) for job, response in known]
        if self._judge is not None:
            answers = _judged(answers, self._judge, verdicts, mode=e.judge.mode)
        notes = []
        if task.rows is not None and not e.limit and len(rows.rows) != task.rows:
            notes.append(f"{rows.name} has {len(rows.rows)} rows, not the published {task.rows}")
        for note in notes:
            say(f"{task.title}: {note}")
        numbers = summarise(task, answers, seed=e.seed) | {"errors": len(errors)}
        if numbers["unjudged"] and self._judge is not None and self._judge.reason:
            notes.append(f"the judge: {self._judge.reason}")  # it was said when it happened
        return TaskResult(task, rows.name, numbers, answers, errors, notes, rows.image_roots)


@contextlib.contextmanager
def _journals(output: pathlib.Path) -> Iterator[tuple[Journal | None, Journal | None]]:
    """Responses and verdicts, in the first process."""
    if not is_first():
        yield None, None
        return
    with Journal(output / _RESPONSES) as responses, Journal(output / _VERDICTS) as verdicts:
        yield responses, verdicts


def output_of(config, workdir: pathlib.Path | None) -> pathlib.Path:
    """Where answers are kept: `config.eval.output`, else the run's eval/. InputError if it holds something else."""
    if not config.eval.output and workdir is None:
        raise InputError("--mode eval needs --workdir of a run, or --config.eval.output=DIR")
    own = workdir / files.EVALUATION if workdir is not None else pathlib.Path()
    output = pathlib.Path(config.eval.output).expanduser() if config.eval.output else own
    check_own(output, field="eval.output", first=_RESPONSES, others=(_VERDICTS, *WRITTEN))
    return output


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
    asked = (question.reference, question.alternatives, question.options, question.precision)
    known = content_key(GRADING, task.name, *asked, boxed, lenient)
    if known not in verdicts:
        strict = task.grade(question, boxed, math)
        loose = strict if lenient == boxed else task.grade(question, lenient, math)
        record = {"answer": boxed, "is_correct": strict.is_correct, "grader": strict.grader}
        verdicts.append(known, record | {"is_correct_leniently": loose.is_correct})
    v = verdicts[known] or {}  # this journal keeps its values
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
        item = Item(a.question.text, a.question.accepted, a.answer or a.text)
        key = content_key("judge", judge.model, PROMPT, item.shown())
        keys.append(key if is_asked else None)
        if is_asked and key not in verdicts:
            asked[key] = item
    numbered = list(asked)
    progress = Progress(total=len(asked), start=0, title="judge", every=max(1, len(asked) // 20))
    for done, (number, is_right) in enumerate(judge.verdicts(list(asked.values())), start=1):
        verdicts.append(numbered[number], {"is_correct": is_right, "grader": "judge"})
        progress.update(done, {})
    progress.close()
    out = []
    for a, key in zip(answers, keys, strict=True):
        if key is not None:
            said = ((key in verdicts and verdicts[key]) or {}).get("is_correct")
            a = dataclasses.replace(a, is_correct=said, grader="judge")
        out.append(a)
    return out


def fingerprint_of(folder: pathlib.Path, *facts: Any) -> str:
    """A short hash of `facts` and of the model folder's files that affect answers (`_ANSWER_FILES`).

    Of large files, only the size and 17 blocks are hashed. A model card, a license or an evaluation does not count.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for path in sorted({p for pattern in _ANSWER_FILES for p in folder.glob(pattern) if p.is_file()}):
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
        cells = [f"{n['questions']}", number_text(n["pass"]), number_text(n["avg"]), interval_text(n)]
        cells += [number_text(n["avg_lenient"]), number_text(n["format_valid"], digits=1)]
        cells += [number_text(n["truncated"], digits=1), number_text(n["tokens"], digits=0)]
        lines.append(f"{r.task.title:26}" + "".join(f"{c:>{w}}" for c, w in zip(cells, _WIDTHS, strict=True)))
        own = "  ".join(f"{k} {number_text(v)}" for k, v in own_numbers(n).items())
        lines += [f"    {own}"] if own else []
        lines += [f"    {reason}"] if (reason := why_nothing(n)) else []
        kinds = ", ".join(sorted({kind for _, kind in r.errors}))
        lines += [f"    {len(r.errors)} question(s) could not be asked ({kinds})"] if r.errors else []
        lines += [f"    {n['unjudged']} answer(s) still to be judged"] if n["unjudged"] else []
    return "\n".join(lines)
