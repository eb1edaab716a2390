"""`--mode diagnose`: PALR of a run's role table, on rollouts of its student or of any engine.

Every counterfactual teacher is the run's own role table on rows that differ in one thing, the answer or the image,
through the same packed program; the supervised tokens of all passes correspond one to one.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from vigos_jax.analysis import palr
from vigos_jax.analysis.score_rollouts import rollouts_source
from vigos_jax.analysis.wrong_answers import choices_of, choose, read_file
from vigos_jax.data.cleaning import clean_reference
from vigos_jax.data.examples import Example
from vigos_jax.data.processor import EncodedImage
from vigos_jax.errors import InputError
from vigos_jax.grading.answer_text import answer_kind
from vigos_jax.method.rows import Row
from vigos_jax.method.scoring import score_batch, teacher_logps
from vigos_jax.models.variables import Variables
from vigos_jax.report import page
from vigos_jax.rollouts.engine import EngineFactory, NativeEngine
from vigos_jax.rollouts.parse import FAILED, Case, Reader, first_image, parse, pieces, read_cases, spans_json
from vigos_jax.rollouts.sample_rows import sample_rows
from vigos_jax.rollouts.sampler import row_keys
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.runtime import workdir as files
from vigos_jax.runtime.files import check_own, write_json
from vigos_jax.runtime.progress import bar, say
from vigos_jax.session import Session, open_source

MAX_SHOWN = 40  # rollouts on the page
ANSWER_COLOR, IMAGE_COLOR = (220, 70, 50), (50, 110, 220)


@dataclasses.dataclass(frozen=True)
class _Counterfactuals:
    """What a case is scored under besides its own row: wrong answers, and the images of another example."""

    case: Case
    wrong_answers: tuple[str, ...]
    images: Example


def output_of(config, workdir: pathlib.Path | None) -> pathlib.Path:
    """Where to write: `config.diagnose.output`, else the run's diagnose/. InputError if it holds something else."""
    if not config.diagnose.output and workdir is None:
        raise InputError("--mode diagnose needs --workdir of a run, or --config.diagnose.output=DIR")
    own = workdir / files.DIAGNOSIS if workdir is not None else pathlib.Path()
    output = pathlib.Path(config.diagnose.output).expanduser() if config.diagnose.output else own
    check_own(output, field="diagnose.output", first="palr.jsonl", others=("summary.json", "palr.html"))
    return output


def diagnose(
    session: Session,
    trained: Variables,
    config,
    *,
    teacher_params: Variables,
    output: pathlib.Path,
    open_engine: EngineFactory = NativeEngine,
) -> tuple[str, list[str]]:
    """Writes palr.jsonl (per rollout, lists per token), summary.json and palr.html into `output`.

    Args:
      trained, teacher_params: what replaces or adapts the base for student and teachers.

    Returns:
      (the table for a terminal, one line per bad row).

    Raises:
      InputError: rollouts or wrong answers that cannot be read, or no usable row.
    """
    d = config.diagnose
    source, rows, cases, name = _cases(session, trained, config, open_engine)
    given = read_file(d.wrong_answers_file) if d.wrong_answers_file else {}
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot write to {output}: {e.strerror}; choose a writable --config.diagnose.output") from e

    counts: Counter[str] = Counter()
    bad_lines: list[str] = []
    reader, size = Reader.of(session, config), session.whole_batch(d.batch_size)
    valid = _checked(cases, name, bad_lines, counts)
    usable = _with_counterfactuals(valid, source, rows, given, reader, counts, config)
    score = _scorer(session, reader)
    sums: dict[str, list[palr.Sums]] = {group: [] for group in palr.GROUPS}
    shown: list[page.Rollout] = []
    temporary = output / "palr.jsonl.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        for part in bar(_in_parts(usable, size), title="diagnose"):
            for item, scores in zip(part, score(part, size, trained, teacher_params), strict=True):
                for group, parts in palr.GROUPS.items():
                    sums[group].append(palr.group_sums(scores, _mask(item.case, parts)))
                file.write(json.dumps(_record(item, scores, session)) + "\n")
                if len(shown) < MAX_SHOWN:
                    shown.append(_page_rollout(item, scores, source, session))
    if not counts["scored"]:
        temporary.unlink()
        reasons = ", ".join(f"{k} {n}" for k, n in counts.items()) or "no rows"
        raise InputError(f"PALR needs valid rollouts with a wrong answer and another image; there is none: {reasons}")
    temporary.replace(output / "palr.jsonl")
    table = _table(sums, counts, seed=d.seed)
    _write(output, table, sums, counts, shown)
    say(f"wrote {output / 'palr.jsonl'}, {output / 'summary.json'} and {output / 'palr.html'}")
    return table.text(), bad_lines


def _cases(
    session: Session, trained: Variables, config, open_engine: EngineFactory
) -> tuple[Any, int, Iterator[Case], Callable[[int], str]]:
    """(source, number of rows used, their rollouts, row index -> name): from a file, or sampled from the student."""
    d = config.diagnose
    if d.rollouts:
        source = rollouts_source(d.rollouts, "diagnose.rollouts", config)
        return source, len(source), read_cases(source, session, config), lambda i: f"{source.path}:{source.line(i)}"
    source = open_source(config).for_diagnosis(count=d.rows, seed=config.demo_eval.seed)
    rows = min(d.rows, len(source))
    sampled = _sample(source, rows, session, trained, config, open_engine)
    return source, rows, sampled, lambda i: f"{config.data.source}: row {i + 1}"


def _sample(
    source: Any, rows: int, session: Session, trained: Variables, config, open_engine: EngineFactory
) -> Iterator[Case]:
    """Rollouts of the student, as in training, for the source's first rows."""
    reader, sampling = Reader.of(session, config), Sampling(**config.sampling)
    size = session.whole_batch(config.diagnose.batch_size)
    with contextlib.closing(open_engine(session, sampling)) as engine:
        engine.sync(trained)
        for first in range(0, rows, size):
            numbers = range(first, min(first + size, rows))
            examples = [reader.example(source, i, max_completion=sampling.max_tokens) for i in numbers]
            own = [reader.row(e) for e in examples]
            # Keys by row: the same rollouts whatever the batch size.
            keys = row_keys(config.diagnose.seed, 0, size, first_row=first)
            rollouts = parse(session, own, sample_rows(engine, session, own, keys))
            for i, example, row, rollout in zip(numbers, examples, own, rollouts, strict=True):
                reason = FAILED if rollout is None and example.bad_reason is None else example.bad_reason
                yield Case(i, example, row, rollout, reason)


def _checked(cases: Iterator[Case], name, bad_lines: list[str], counts: Counter) -> Iterator[Case]:
    """The valid rollouts; the others are counted, and bad rows named."""
    for case in cases:
        counts["rows"] += 1
        if case.bad_reason:
            counts["bad rows"] += 1
            bad_lines.append(f"{name(case.index)}: {case.complaint}")
        elif not case.scored.spans.is_valid:
            counts["invalid rollouts"] += 1
        else:
            yield case


def _with_counterfactuals(
    cases: Iterator[Case], source: Any, rows: int, given: dict[str, list[str]], reader: Reader, counts: Counter, config
) -> Iterator[_Counterfactuals]:
    """Adds wrong answers, and the images of the next case whose images differ; the last cases get the first one's."""
    others = _answers_by_kind(source, rows)
    waiting: list[tuple[Case, tuple[str, ...]]] = []
    first: Case | None = None

    def pair(images: Example) -> Iterator[_Counterfactuals]:
        still = []
        for case, wrong in waiting:
            if _same(case.example.images, images.images) or not _fits(reader, case, images=images):
                still.append((case, wrong))
            else:
                counts["scored"] += 1
                yield _Counterfactuals(case, wrong, images)
        waiting[:] = still

    for case in cases:
        first = first or case
        yield from pair(case.example)
        raw = source[case.index]
        own = given.get(case.example.id) or raw.get("wrong_answers") or ()
        where, wrong = choose(
            reference=case.example.reference,
            count=config.diagnose.wrong_answers,
            seed=f"{config.diagnose.seed} {case.index}",
            given=own if isinstance(own, list | tuple) else (),
            options=choices_of(raw, case.example.problem),
            others=others,
        )
        wrong = tuple(answer for answer in wrong if _fits(reader, case, reference=answer))
        counts[f"wrong answers from {where}" if wrong else "no wrong answer"] += 1
        if wrong:
            waiting.append((case, wrong))
    if first is not None:
        yield from pair(first.example)
    if waiting:
        counts["no other image"] += len(waiting)


def _fits(reader: Reader, case: Case, **changes: Any) -> bool:
    return reader.too_long(case.example, max_completion=len(case.scored.ids), **changes) is None


def _answers_by_kind(source: Any, rows: int) -> dict[str, list[str]]:
    answers = {clean_reference(source[i].get("answer")) for i in range(rows)} - {""}
    out = defaultdict(list)
    for answer in sorted(answers):
        out[answer_kind(answer)].append(answer)
    return dict(out)


def _same(a: tuple[EncodedImage, ...], b: tuple[EncodedImage, ...]) -> bool:
    return len(a) == len(b) and all(
        x.grid == y.grid and np.array_equal(x.patches, y.patches) for x, y in zip(a, b, strict=True)
    )


def _in_parts(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    part = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _scorer(session: Session, reader: Reader):
    """(cases with counterfactuals, batch size, trained, teacher_params) -> TokenCorrections per case."""
    model, objective = session.model, session.objective
    shows_reference = np.array([r.shows_reference for r in session.roles])

    @jax.jit
    def own(base, trained, frozen, batch):
        scores = score_batch(model, base, trained, batch, objective, **frozen)
        return scores.student_logp, scores.teacher_logp

    @jax.jit
    def teachers(base, frozen, batch):
        return teacher_logps(model, base, batch, objective, **frozen)

    def score(part: list[_Counterfactuals], size: int, trained: Variables, teacher_params: Variables):
        frozen = {"teacher_params": teacher_params, "others": session.others}
        empty = size - len(part)
        rollouts = [x.case.scored for x in part] + [None] * empty

        def counterfactual(rows: list[Row]) -> np.ndarray:
            batch = session.pack_scores(rows + [Row()] * empty, rollouts)
            # The same rollouts under the same roles: one by one the same supervised tokens.
            assert np.array_equal(batch.supervised.position, tokens.position)
            return jax.device_get(teachers(session.base, frozen, session.put_batch(batch)))

        batch = session.pack_scores([x.case.row for x in part] + [Row()] * empty, rollouts)
        tokens = jax.tree.map(np.asarray, batch.supervised)
        student, teacher = jax.device_get(own(session.base, trained, frozen, session.put_batch(batch)))
        # A case with fewer wrong answers repeats its first, which is then left out of the mixture.
        most = max(len(x.wrong_answers) for x in part)
        shown = [[*x.wrong_answers, *x.wrong_answers[:1] * (most - len(x.wrong_answers))] for x in part]
        wrong = []
        for k in range(most):
            rows = [reader.row(x.case.example, reference=w[k]) for x, w in zip(part, shown, strict=True)]
            wrong.append(counterfactual(rows))
        wrong = np.stack(wrong)  # [K, B, E]
        image = counterfactual([reader.row(x.case.example, images=x.images) for x in part])
        for i, x in enumerate(part):
            used = tokens.role[i] >= 0
            role = tokens.role[i][used]
            yield palr.token_corrections(
                position=tokens.position[i][used],
                role=role,
                shows_reference=shows_reference[role],
                student=student[i][used],
                teacher=teacher[i][used],
                wrong=palr.mixture_logp(wrong[:, i][:, used], np.arange(most) < len(x.wrong_answers)),
                image=image[i][used],
            )

    return score


def _mask(case: Case, parts: tuple[str, ...]) -> np.ndarray:
    out = np.zeros(len(case.scored.ids), bool)
    for part in parts:
        out[slice(None) if part == "completion" else slice(*getattr(case.scored.spans, part))] = True
    return out


def _record(item: _Counterfactuals, scores: palr.TokenCorrections, session: Session) -> dict[str, Any]:
    """The line of palr.jsonl: lists over the completion's tokens, null where no role scores one.

    If two roles score a token, the PALR sums include both, and the lists show the one that is first in the role table.
    """
    rollout = item.case.scored
    n = len(rollout.ids)
    lists: dict[str, list[Any]] = {k: [None] * n for k in ("role", "s", "c_answer", "c_image")}
    for e in reversed(range(len(scores.position))):
        j = int(scores.position[e])
        lists["role"][j] = session.roles[scores.role[e]].name
        for key, values in (("s", scores.strength), ("c_answer", scores.answer), ("c_image", scores.image)):
            lists[key][j] = float(values[e])
    head = {"id": item.case.example.id, "reference": item.case.example.reference}
    head |= {"wrong_answers": list(item.wrong_answers), "completion_ids": list(rollout.ids)}
    return head | {"tokens": pieces(session, rollout.ids), "spans": spans_json(rollout)} | lists


def _page_rollout(item: _Counterfactuals, scores: palr.TokenCorrections, source: Any, session: Session) -> page.Rollout:
    example, rollout = item.case.example, item.case.scored
    record = _record(item, scores, session)
    weight = np.zeros(len(rollout.ids))
    np.add.at(weight, scores.position, scores.strength * (scores.answer + scores.image))
    strongest = max(float(weight.max(initial=0.0)), 1e-9)
    tokens = []
    for j, text in enumerate(record["tokens"]):
        if record["role"][j] is None:
            tokens.append(page.Token(text, title="not supervised"))
            continue
        s, a, i = (record[k][j] for k in ("s", "c_answer", "c_image"))
        color = page.mix(IMAGE_COLOR, ANSWER_COLOR, a / (a + i) if a + i > 0 else 0.5)
        hover = f"{record['role'][j]}: s {s:.3f}, answer {a:.3f}, image {i:.3f}"
        tokens.append(page.Token(text, color, 0.75 * float(weight[j] / strongest) ** 0.5, hover))
    title = f"{example.id} · reference {example.reference!r}, wrong {', '.join(item.wrong_answers)}"
    return page.Rollout(title, example.problem, tokens, [page.image_uri(first_image(source, item.case.index))])


def _table(sums: dict[str, list[palr.Sums]], counts: Counter, *, seed: int) -> page.Table:
    rows = []
    for group, of_rollouts in sums.items():
        total = palr.total(of_rollouts)
        low, high = palr.interval(of_rollouts, seed=seed)
        sums_per_token = (total.strength, total.answer, total.image)
        means = [f"{x / total.tokens:.4f}" if total.tokens else "-" for x in sums_per_token]
        rows.append([group, f"{int(total.tokens)}", *means, f"{palr.ratio(total):.4f}", f"{low:.4f} - {high:.4f}"])
    return page.Table(
        title="PALR: share of the correction that hangs on the answer",
        head=["tokens of", "supervised", "mean s", "mean c^A", "mean c^I", "PALR", "95 % interval"],
        rows=rows,
        note="T_d description, T_ra reasoning and answer, T_y all; "
        + ", ".join(f"{name} {n}" for name, n in counts.items()),
    )


def _write(output: pathlib.Path, table: page.Table, sums: dict[str, Any], counts: Counter, shown: list[Any]) -> None:
    totals = {group: palr.total(of_rollouts) for group, of_rollouts in sums.items()}
    summary = {group: {"palr": float(palr.ratio(x)), "tokens": int(x.tokens)} for group, x in totals.items()}
    write_json(output / "summary.json", summary | {"counts": dict(counts)})
    legend = page.Text(
        [
            "Red: the right answer makes this token likelier than a wrong one does. Blue: the right image does. The "
            "stronger the colour, the more the teacher corrects the student there. Hover for the numbers.",
        ]
    )
    title = page.Text([f"{len(shown)} of the rollouts:"])
    page.write_page(output / "palr.html", "What the teachers' corrections hang on", [table, legend, title, *shown])
