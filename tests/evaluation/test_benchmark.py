"""`--mode eval` from the command line on a tiny random model: resumable, graded, counted, never silent."""

import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs as runs
from browser import dump, needs_browser
from judge_server import refused, serving
from task_files import make_all, write_table

from vigos_jax import main
from vigos_jax.errors import InputError
from vigos_jax.evaluation import benchmark as lib
from vigos_jax.evaluation.answers import named_keys
from vigos_jax.evaluation.report import coloured, write_report
from vigos_jax.evaluation.statistics import Answer, summarise
from vigos_jax.evaluation.tasks import TASKS
from vigos_jax.evaluation.tasks.task import Question
from vigos_jax.grading.rules import GRADERS
from vigos_jax.models.layers import LoraSpec
from vigos_jax.runtime.journal import Journal, content_key

SAMPLES = 3
ROOT = pathlib.Path(lib.__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("cache"))
    with runs.compile_once():
        yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return runs.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_all(tmp_path_factory.mktemp("tasks"))


def run(world, output, tasks, sources, *more) -> int:
    return world.run(*arguments(output, tasks, sources), *more)


def arguments(output, tasks, sources) -> list[str]:
    named = [f"--config.eval.sources.{t}={sources[t]}" for t in tasks if t in sources]
    fixed = ["--config.eval.max_tokens=12", "--config.eval.batch_size=8", f"--config.eval.samples={SAMPLES}"]
    fixed += ["--config.buckets.patches=(128,)", "--config.buckets.prompt=(192,)", "--config.eval.demo_questions=3"]
    listed = f"--config.eval.tasks={tuple(tasks)!r}"
    return ["--mode=eval", f"--config.eval.output={output}", listed, *fixed, *named]


def results(output) -> dict:
    return json.loads((output / "results.json").read_text())


def responses(output) -> list[dict]:
    return runs.read_rows(output / "responses.jsonl")


@pytest.fixture(scope="module")
def finished(world, sources, tmp_path_factory):
    """All benchmarks with a file in one run."""
    output = tmp_path_factory.mktemp("eval") / "all"
    assert run(world, output, list(sources), sources) == 0
    return output


@pytest.mark.slow
def test_every_task_is_answered(finished, sources):
    numbers = results(finished)
    assert set(numbers) == set(sources)
    fixed = ("vilp_f", "vilp_p", "vlind")
    for name, n in numbers.items():
        assert n["samples"] == n["questions"] * (1 if name in fixed else SAMPLES) and n["errors"] == n["unjudged"] == 0
        assert all(0 <= n[k] <= 100 for k in ("pass", "avg", "avg_low", "avg_high", "avg_lenient", "format_valid"))
        assert 0 < n["tokens"] <= 12 and n["source"] == sources[name]
    assert "has 5 rows, not the published 2638" in numbers["cv_bench"]["notes"][0]
    assert len(responses(finished)) == sum(n["samples"] for n in numbers.values())


def test_every_verdict_says_who_gave_it(finished):
    verdicts = runs.read_rows(finished / "verdicts.jsonl")
    assert verdicts and all(v["grader"] in GRADERS and isinstance(v["is_correct"], bool) for v in verdicts)


def test_the_samples_of_a_question_differ(finished):
    texts = {}
    for r in responses(finished):
        texts.setdefault((r["task"], r["id"]), []).append(r["text"])
    several = [t for t in texts.values() if len(t) == SAMPLES]
    assert several and all(len(set(t)) == SAMPLES for t in several)


def test_nothing_is_done_twice(finished, world, sources, monkeypatch):
    """A finished evaluation is only read: no sampler, no grader."""
    before, numbers = runs.bytes_of(finished), results(finished)
    monkeypatch.setattr(lib.Asker, "_sample_batch", lambda *args: pytest.fail("sampled again"))
    monkeypatch.setattr(lib.MathGrader, "is_equal", lambda *args: pytest.fail("graded again"))
    assert run(world, finished, list(sources), sources) == 0
    assert runs.bytes_of(finished) == before and results(finished) == numbers


@pytest.mark.parametrize("cut", [0, 1, 700, 1500])
def test_an_evaluation_goes_on_where_it_was_cut(finished, world, sources, tmp_path, cut):
    """Files as a kill leaves them, mid-line: the same answers in the end, whatever batches the rest was sampled in."""
    names = ["mmmu", "vilp_f", "mathverse"]
    output = tmp_path / "cut"
    output.mkdir()
    chosen = [r for r in responses(finished) if r["task"] in names]
    whole = "".join(json.dumps(r) + "\n" for r in chosen).encode()
    (output / "responses.jsonl").write_bytes(whole[:cut])
    assert run(world, output, names, sources) == 0
    key = lambda r: r["key"]  # noqa: E731
    assert sorted(responses(output), key=key) == sorted(chosen, key=key)
    assert {k: results(output)[k] for k in names} == {k: results(finished)[k] for k in names}


def test_greedy_is_one_answer_whatever_the_seed(finished, world, sources, tmp_path):
    output, greedy = tmp_path / "greedy", "--config.eval.temperature=0.0"
    assert run(world, output, ["mathverse"], sources, greedy) == 0
    assert run(world, tmp_path / "other", ["mathverse"], sources, greedy, "--config.eval.seed=7") == 0
    texts, others = ({r["id"]: r["text"] for r in responses(o)} for o in (output, tmp_path / "other"))
    assert texts == others and len(responses(output)) == len(texts) == 4
    assert not {r["key"] for r in responses(output)} & {r["key"] for r in responses(finished)}


def test_the_plain_prompt_is_another_question(world, sources, tmp_path, finished):
    output = tmp_path / "plain"
    assert run(world, output, ["mathverse"], sources, "--config.eval.prompt=plain") == 0
    ours, theirs = (
        {(r["id"], r["sample"]): r for r in responses(o) if r["task"] == "mathverse"} for o in (output, finished)
    )
    assert ours.keys() == theirs.keys() and any(ours[k]["text"] != theirs[k]["text"] for k in ours)
    assert not {r["key"] for r in ours.values()} & {r["key"] for r in theirs.values()}


@pytest.mark.slow
def test_another_model_is_asked_anew(world, sources, tmp_path):
    output = tmp_path / "two"
    assert run(world, output, ["realworldqa"], sources) == 0
    assert run(world, output, ["realworldqa"], sources, f"--config.model.adapter={world.adapter}") == 0
    assert len(responses(output)) == 2 * SAMPLES and len({r["key"] for r in responses(output)}) == 2 * SAMPLES


def test_questions_that_cannot_be_asked_are_counted(world, sources, tmp_path, capsys):
    """No silent text-only question: the row is an error, the exit code says so, the others are answered."""
    picture = {"bytes": b"no picture", "path": None}
    good = {"bytes": (world.folder / "pictures" / "0.png").read_bytes(), "path": None}
    rows = [{"question": "Q?", "answer": "1", "image": x} for x in (good, picture, None)]
    rows += [{"question": "long " * 500, "answer": "1", "image": good}, {"question": "", "answer": "1", "image": good}]
    folder = write_table(tmp_path / "bad", "test", rows, image=datasets.Image())
    assert run(world, tmp_path / "out", ["mmmu"], {"mmmu": str(folder)}) == 1
    n = results(tmp_path / "out")["mmmu"]
    assert (n["questions"], n["errors"], n["samples"]) == (1, 4, SAMPLES)
    assert "4 question(s) could not be asked" in capsys.readouterr().out


def test_hostile_rows(world, tmp_path):
    """One sample each of whatever a table can hold: asked, or counted with its reason."""
    good = {"bytes": (world.folder / "pictures" / "0.png").read_bytes(), "path": None}
    rows = [
        {"question": "q" * 200_000, "options": "", "answer": "1"},
        {"question": "\u202eQ\u0000? 日本 🙂 <|im_end|> <image>", "options": "['only one']", "answer": "A"},
        {"question": "Q? <|image_pad|>", "options": "[" * 3000, "answer": "9**9**9"},
        {"question": "Q?", "options": "[None, 'b', ['c']]", "answer": "\\boxed{{{"},
        {"question": "{problem} {reference}", "options": str(list(range(40))), "answer": "a"},
        {"question": "Q?", "options": "", "answer": "nan"},
        {"question": "Q?", "options": "", "answer": "..."},
    ]
    rows = [row | {"id": "same", "precision": None, "image": good} for row in rows]
    rows[1]["precision"] = 1e300
    folder = write_table(tmp_path / "hostile", "test", rows, image=datasets.Image())
    assert run(world, tmp_path / "out", ["mmmu"], {"mmmu": str(folder)}, "--config.eval.samples=1") == 1
    n = results(tmp_path / "out")["mmmu"]
    assert (n["questions"], n["samples"], n["errors"]) == (3, 3, 4)
    said = (tmp_path / "out" / "report.md").read_text()
    assert "4 question(s) could not be asked (bad_options, prompt_too_long, too_many_options)" in said
    one = ["--config.eval.samples=1", "--config.eval.limit=1"]
    assert run(world, tmp_path / "one", ["demo"], {}, *one) == 0
    assert results(tmp_path / "one")["demo"]["samples"] == 1


def test_an_answer_is_kept_for_the_size_of_its_images(world, sources, tmp_path):
    """Other limits ask something else; larger buckets that no image needs ask the same."""
    asked = (world, tmp_path / "out", ["mathverse"], sources, "--config.eval.temperature=0.0")
    assert run(*asked) == 0
    first = {r["key"] for r in responses(tmp_path / "out")}
    assert run(*asked, "--config.buckets.patches=(256,)", "--config.buckets.prompt=(256,)") == 0
    assert {r["key"] for r in responses(tmp_path / "out")} == first
    assert run(*asked, "--config.data.max_pixels=3136") == 0
    assert len({r["key"] for r in responses(tmp_path / "out")}) == 2 * len(first)


@pytest.mark.slow
def test_the_demo_end_to_end(tmp_path, capsys):
    """As a user runs it: the shipped base, then a student trained on the demo, from the command line."""
    short = ["--config=configs/base.py", "--config.eval.demo_questions=8", "--config.eval.samples=2"]
    short += ["--config.demo_eval.questions=0", "--config.export.after_training=False"]
    command = ["vigos_jax", *short]
    assert main.main([*command, "--mode=eval", f"--config.eval.output={tmp_path / 'base'}"]) == 0
    base = results(tmp_path / "base")["demo"]
    assert (base["questions"], base["samples"], base["errors"]) == (16, 32, 0)
    assert base["prior"] > base["score"] and base["format_valid"] > 60 and base["truncated"] < 20
    workdir = tmp_path / "run"
    assert main.main([*command, f"--workdir={workdir}", "--config.steps=2", "--config.batch_size=8"]) == 0
    capsys.readouterr()
    assert main.main([*command, f"--workdir={workdir}", "--mode=eval"]) == 0
    trained = results(workdir / "eval")["demo"]
    assert (trained["questions"], trained["samples"]) == (16, 32) and trained["format_valid"] > 60
    said = capsys.readouterr().out
    assert "Demo" in said and "score" in said and "prior" in said and "report.html" in said
    page = (workdir / "eval" / "report.html").read_text()
    assert f"{workdir} (step 2, from " in page and page.count("data:image/png;base64,") == 16
    texts = [[(r["id"], r["sample"], r["text"]) for r in responses(o)] for o in (tmp_path / "base", workdir / "eval")]
    assert len(texts[0]) == len(texts[1]) == 32


@pytest.mark.slow
def test_every_kind_of_checkpoint(tmp_path_factory, world, sources, tmp_path):
    """A run's workdir, its adapter beside the base and its merged folder are one student, and the base another."""
    workdir = runs.finished_run(tmp_path_factory).workdir
    for kind in ("adapter", "merged"):
        exported = [f"--config.export.kind={kind}", f"--config.export.output={tmp_path / kind}"]
        assert world.run("--mode=export", f"--workdir={workdir}", *exported) == 0
    kinds = {
        "base": [],
        "workdir": [f"--workdir={workdir}"],
        "adapter": [f"--config.model.adapter={tmp_path / 'adapter'}"],
        "merged": [f"--config.model.path={tmp_path / 'merged'}"],
    }
    answers = {}
    for kind, flags in kinds.items():
        output = tmp_path / kind / "eval"
        assert run(world, output, ["mathverse"], sources, "--config.eval.temperature=0.0", *flags) == 0
        answers[kind] = {r["key"]: (r["id"], r["text"]) for r in responses(output)}
        assert len(answers[kind]) == 4
    assert answers["adapter"] == answers["workdir"]  # the same keys too: the same weights, wherever they lie
    texts = {kind: sorted(a.values()) for kind, a in answers.items()}
    assert texts["merged"] == texts["workdir"] != texts["base"]
    assert not answers["merged"].keys() & answers["workdir"].keys()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--config.eval.tasks=('nothing',)"], ["'nothing' is unknown", "mm_vet"]),
        (["--config.eval.samples=0"], ["config.eval.samples=0", "at least 1"]),
        (["--config.eval.tasks=('mmmu',)", "--config.eval.sources.mmmu=/nowhere"], ["/nowhere", "does not exist"]),
        (["--config.eval.max_tokens=0"], ["config.eval.max_tokens=0", "at least 1"]),
        (["--config.eval.prompt=free"], ["config.eval.prompt='free'", "structured, plain"]),
        (["--config.eval.output="], ["--config.eval.output=DIR"]),
        (["--config.eval.sources.nothing=x"], ["no field 'nothing'", "vilp_f"]),
    ],
)
def test_bad_input(world, tmp_path, capsys, options, words):
    assert world.run("--mode=eval", f"--config.eval.output={tmp_path / 'out'}", *options) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_nowhere_to_write_and_a_broken_journal(world, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run(world, tmp_path / "file" / "out", ["demo"], {}) == 2
    assert "cannot write" in capsys.readouterr().err and (tmp_path / "file").read_text() == "mine"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "responses.jsonl").write_text("")
    verdicts = tmp_path / "out" / "verdicts.jsonl"
    verdicts.write_text('{"key": "a"}\ngarbage\n{"key": "b"}\n')
    assert run(world, tmp_path / "out", ["demo"], {}) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "verdicts.jsonl, line 2, is not a record" in said and "garbage" in verdicts.read_text()


# -- judge and report ---------------------------------------------------------------------------------------------


def test_a_judge_decides_what_rules_call_wrong(world, sources, tmp_path, monkeypatch, capsys):
    """Failed calls leave answers unjudged and out of the numbers; run again, only they are asked about."""
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-123")

    def always_true(handler, items):
        handler.reply(json.dumps({"verdicts": [True] * len(items)}))

    output = tmp_path / "judged"
    with serving(always_true, *[refused(400, "too long")] * 2) as server:
        options = [f"--config.eval.judge.{k}={v}" for k, v in {"url": server.url, "model": "m", "batch": 1}.items()]
        options += ["--config.eval.judge.mode=on_failure", "--config.eval.judge.concurrency=1"]
        options += ["--config.eval.judge.key_env=JUDGE_KEY"]
        assert run(world, output, ["realworldqa"], sources, *options) == 1
        n = results(output)["realworldqa"]
        assert n["unjudged"] == 1 and n["samples"] == SAMPLES and len(server.seen) == SAMPLES + 1
        said = capsys.readouterr()
        assert "1 answer(s) still to be judged" in said.out and said.err.count("the server says 400: too long") == 1
        assert "the judge: the server says 400: too long" in n["notes"]
        assert "the judge: the server says 400" in (output / "report.md").read_text()
        server.script = [always_true]
        assert run(world, output, ["realworldqa"], sources, *options) == 0
        assert results(output)["realworldqa"]["unjudged"] == 0 and len(server.seen) == SAMPLES + 2
        assert run(world, output, ["realworldqa"], sources, *options) == 0 and len(server.seen) == SAMPLES + 2
    written = b"".join(runs.bytes_of(output).values())
    assert b"sk-secret-123" not in written and b'"judge"' in written
    before = runs.bytes_of(output)
    assert run(world, output, ["realworldqa"], sources, *options) == 2  # nobody listens any more
    assert "cannot be reached" in capsys.readouterr().err and runs.bytes_of(output) == before


def test_a_judge_that_always_decides(world, sources, tmp_path, monkeypatch):
    """Its word counts, also against a rule that calls an answer right; each question's answer is asked about once."""
    monkeypatch.setenv("JUDGE_KEY", "x")

    def always_false(handler, items):
        handler.reply(json.dumps({"verdicts": [False] * len(items)}))

    for mode, right in (("always", 0.0), ("on_failure", 100.0)):
        monkeypatch.setattr(lib, "last_boxed", lambda text: "3")  # what realworldqa wants
        with serving(*[always_false] * 9) as server:
            options = {"url": server.url, "model": "m", "mode": mode, "key_env": "JUDGE_KEY"}
            options = [f"--config.eval.judge.{k}={v}" for k, v in options.items()]
            assert run(world, tmp_path / mode, ["realworldqa"], sources, *options) == 0
            assert results(tmp_path / mode)["realworldqa"]["avg"] == right
            assert sum(len(items) for items, _ in server.seen) == (1 if mode == "always" else 0)


@pytest.mark.slow
def test_kill_minus_nine(world, sources, tmp_path, monkeypatch):
    """A real process, killed at random moments of sampling, grading and judging, until one comes through."""
    monkeypatch.setenv("JUDGE_KEY", "x")
    output, names = tmp_path / "out", ["mmmu", "vilp_f", "mathverse", "realworldqa"]
    files = [output / f"{name}.jsonl" for name in ("responses", "verdicts")]
    lines = lambda: sum(f.read_bytes().count(b"\n") for f in files if f.exists())  # noqa: E731
    dice, kills, whole = np.random.default_rng(7), 0, b""
    with serving() as server:
        judged = {"url": server.url, "model": "m", "mode": "on_failure", "batch": 1, "concurrency": 1}
        judged = [f"--config.eval.judge.{k}={v}" for k, v in (judged | {"key_env": "JUDGE_KEY"}).items()]
        command = [sys.executable, "-m", "vigos_jax.main", f"--config={world.config}"]
        command += [*arguments(output, names, sources), *judged]
        while True:
            process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
            enough = lines() + int(dice.integers(1, 12))
            while kills < 4 and process.poll() is None and lines() < enough:
                time.sleep(0.01)
            if kills == 4 or process.poll() is not None:
                break
            time.sleep(float(dice.random()) * 0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            assert files[0].read_bytes().startswith(whole)  # nothing that was whole is touched
            whole = files[0].read_bytes().rpartition(b"\n")[0]
            with files[0].open("ab") as file:  # and torn in the middle of a line
                file.write(b'{"key": "torn", "te')
        assert process.wait() == 0 and kills >= 2
        asked = [json.dumps(items) for items, _ in server.seen]
    for file in files:
        keys = [json.loads(line)["key"] for line in file.read_bytes().splitlines()]
        assert len(set(keys)) == len(keys) and "torn" not in keys
    assert len(asked) - len(set(asked)) <= kills  # only what was on its way when the process died
    again = tmp_path / "again"
    with serving():
        assert run(world, again, names, sources) == 0
    key = lambda r: r["key"]  # noqa: E731
    assert sorted(responses(output), key=key) == sorted(responses(again), key=key)


def test_the_report_has_every_task_and_the_published_rows(finished):
    page, text = (finished / "report.html").read_text(), (finished / "report.md").read_text()
    for name in results(finished):
        assert TASKS[name].title in page and TASKS[name].title in text
    assert (
        "published, 7B ViGOS" in page
        and "| published, 3B base | 60.86 | 27.91 | 59.50 | 93.33 | 55.67 | 80.67 |" in text
    )
    assert "has 5 rows, not the published 2638" in text and "this is a lower bound" in text
    assert page.count("data:image/png;base64,") >= 12


HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"


@pytest.fixture(scope="module")
def hostile_report(tmp_path_factory):
    output = tmp_path_factory.mktemp("report")
    question = Question(HOSTILE, (b"no picture",), HOSTILE, HOSTILE, group=HOSTILE, part=HOSTILE)
    other = dataclasses.replace(question, id="other", group="b|c")
    text = f"{HOSTILE}</description><think>{HOSTILE}</think>\\boxed{{{HOSTILE}}}"
    answers = [
        Answer(q, 0, text, HOSTILE, right, "text", right, 5, True, False)
        for q, right in ((question, True), (other, False))
    ]
    numbers = summarise(TASKS["mmmu"], answers, seed=0) | {"errors": 1}
    result = lib.TaskResult(TASKS["mmmu"], HOSTILE, numbers, answers, [(question, HOSTILE)], [HOSTILE], ())
    write_report([result], output=output, name=HOSTILE, protocol=HOSTILE)
    return output


def test_text_is_escaped(hostile_report):
    for name in ("report.html", "report.md"):
        text = (hostile_report / name).read_text()
        assert "<script" not in text and "<img src=x" not in text and "&lt;script" in text
    assert "b\\|c" in (hostile_report / "report.md").read_text()


@needs_browser
def test_a_browser_shows_the_report(hostile_report, finished, tmp_path):
    for folder, pictures in ((hostile_report, 0), (finished, 12)):
        document, said = dump(folder / "report.html", tmp_path / "profile")
        assert "<title>Evaluation of" in document and "<script" not in document and said == ""
        assert document.count("<img") >= pictures and (pictures or "<img" not in document)


@pytest.mark.parametrize("samples, reason", [(0, "no question was asked"), (1, "no answer has a verdict yet")])
def test_a_task_without_a_verdict_says_so(tmp_path, samples, reason):
    """In the terminal, in results.json, in the report and on the page; never a zero that nobody measured."""
    question = Question("0", (), "Q?", "red")
    answers = [Answer(question, 0, "", "x", None, "judge", None, 5, True, False)] * samples
    numbers = summarise(TASKS["vilp_f"], answers, seed=0) | {"errors": 1}
    result = lib.TaskResult(TASKS["vilp_f"], "here", numbers, answers, [(question, "no_image")], [], ())
    table = lib.table_text([result])
    assert f"n/a: {reason}" in table and "score n/a" in table and "0.00" not in table.replace("100.00", "")
    assert "1 question(s) could not be asked (no_image)" in table
    assert '"avg": null' in json.dumps(numbers)
    write_report([result], output=tmp_path, name="x", protocol="p")
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert f"ViLP-F: n/a: {reason}" in text and "nan" not in text and "None" not in text
    assert "| ViLP-F | 0 | n/a | n/a | n/a | n/a |" in (tmp_path / "report.md").read_text()


def test_parts_are_coloured():
    tokens = coloured("a </description> <think> b </think> \\boxed{c}")
    assert "".join(t.text for t in tokens) == "a </description> <think> b </think> \\boxed{c}"
    assert [t.text for t in tokens if t.strength] == ["a </description>", " <think> b </think>", "\\boxed{c}"]
    tokens = coloured("b </think> \\boxed{x} \\boxed{\\frac{1}{2}} and more")
    assert [t.text for t in tokens if t.strength] == ["b </think>", "\\boxed{\\frac{1}{2}}"]
    assert [t.text for t in coloured("\\boxed{never {closed}") if t.strength] == ["\\boxed{never {closed}"]
    assert [t.strength for t in coloured("no parts at all")] == [0.0]


# -- parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{3}. The answer is 4", "3"),
        ("The answer is **4**.", "4"),
        ("Answer: red\nbecause", "red"),
        ("the option is B", "B"),
        ("I think\nblue\n", "blue"),
        ("", None),
    ],
)
def test_lenient_answer(text, answer):
    assert lib.lenient_answer(text) == answer


def test_named_keys_depend_on_name_and_seed_alone():
    data = lambda seed, names: np.asarray(jax.random.key_data(named_keys(seed, names)))  # noqa: E731
    a, b = data(0, ["x", "y"]), data(0, ["y", "z", "x"])
    assert (a[0] == b[2]).all() and (a[1] == b[0]).all() and (a[0] != a[1]).any() and (data(1, ["x"]) != a[:1]).any()


def test_fingerprint(tmp_path):
    weights = tmp_path / "model-00001-of-00002.safetensors"
    weights.write_bytes(bytes(100_000))
    first = lib.fingerprint_of(tmp_path, "float32")
    assert lib.fingerprint_of(tmp_path, "float32") == first != lib.fingerprint_of(tmp_path, "bfloat16")
    content = bytearray(100_000)
    content[99_999] = 1
    weights.write_bytes(content)
    assert lib.fingerprint_of(tmp_path, "float32") != first


def test_the_fingerprint_is_of_what_changes_answers(world, tmp_path):
    folder = pathlib.Path(shutil.copytree(world.model, tmp_path / "model"))
    first = lib.fingerprint_of(folder)
    for name in ("README.md", "LICENSE", "measured.json", ".lock", "eval/responses.jsonl", ".cache/huggingface/x.lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("edited")
        assert lib.fingerprint_of(folder) == first, name
    # Every file that a loader reads; those that this model has not may come.
    may_come = {"chat_template.jinja", "processor_config.json", "video_preprocessor_config.json", "added_tokens.json"}
    may_come |= {"additional_chat_templates/tool.jinja", "vocab.json", "merges.txt", "special_tokens_map.json"}
    there = {p.name for p in world.model.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "preprocessor_config.json"} <= there
    seen = {first}
    for name in sorted(there | may_come):
        (folder / name).parent.mkdir(exist_ok=True)
        with (folder / name).open("ab") as file:
            file.write(b" ")
        assert lib.fingerprint_of(folder) not in seen, name
        seen.add(lib.fingerprint_of(folder))


def test_an_evaluation_inside_the_model_folder_is_gone_on_with(world, sources, tmp_path, capsys):
    model = pathlib.Path(shutil.copytree(world.model, tmp_path / "model"))
    own = f"--config.model.path={model}"
    for _ in range(2):
        assert run(world, model / "eval", ["realworldqa"], sources, own) == 0
    assert f"{SAMPLES} of {SAMPLES} answers are there already" in capsys.readouterr().err


def test_the_fingerprint_knows_the_scale_of_an_adapter():
    evaluation, seen = object.__new__(lib.Evaluation), set()
    trained = {"lora": {"a": jnp.ones((2, 2))}}
    for scale in (1.0, 2.0):
        spec = LoraSpec(rank=2, scale=scale, language=frozenset(("q_proj", "k_proj")))
        model = types.SimpleNamespace(lora=spec)
        evaluation._base = "base"
        evaluation._session = types.SimpleNamespace(model=model, mesh=jax.make_mesh((2,), ("data",)))
        seen |= {evaluation.fingerprint(trained), evaluation.fingerprint({})}
    assert len(seen) == 3  # the base is one, whatever adapters it could have


def test_journal(tmp_path):
    path = tmp_path / "sub" / "j.jsonl"
    with Journal(path) as journal:
        journal.append("a", {"x": "\ud800é"})
        journal.append("b", {"x": 2})
        journal.append("a", {"x": 3})
    with path.open("ab") as file:
        file.write(b'{"key": "c", "x"')
    with Journal(path) as journal:
        assert list(journal) == ["a", "b"] and journal["a"]["x"] == 3 and "c" not in journal
        journal.append("c", {"x": 4})
    with Journal(path) as journal:
        assert journal["c"] == {"key": "c", "x": 4} and len(journal) == 3
    with Journal(path, keys_only=True) as journal:
        assert list(journal) == ["a", "b", "c"] and journal["c"] is None
        journal.append("d", {"x": 5})
        assert "d" in journal and journal["d"] is None
    assert path.read_bytes().endswith(b'{"key": "d", "x": 5}\n')
    path.write_bytes(path.read_bytes().removesuffix(b'{"key": "d", "x": 5}\n'))
    whole = path.read_bytes()
    for garbage in (b"no json", b"{}", b"[1]", b"7", b"\x00\xff", b'{"key": ["a"]}', b'{"key": 1}', b"[" * 9999, b""):
        path.write_bytes(whole + garbage + b"\n" + whole)
        with pytest.raises(InputError, match="line 5, is not a record with a key; move the file away"):
            Journal(path)
        assert path.read_bytes() == whole + garbage + b"\n" + whole  # nothing is lost
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        Journal(tmp_path / "file" / "j.jsonl")


def test_content_key():
    assert content_key({"a": 1, "b": (2,)}) == content_key({"b": [2], "a": 1}) != content_key({"a": 1, "b": [3]})
