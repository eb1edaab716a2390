"""The page of a run: drawn from the run's files whatever is in them, and driven in a browser."""

import itertools
import json
import math
import pathlib
import re

import pytest
from browser import dump, needs_browser

from configs import base
from vigos_jax import main
from vigos_jax.config import to_json
from vigos_jax.errors import InputError
from vigos_jax.report import run_page
from vigos_jax.report.run_page import write_run_page

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
HOSTILE += "`${1}`\u2028\ud800&"
PICTURE = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
STEPS = (0, 20, 40)
# Per row and step: (is_valid, is_correct, is_leaky).
VERDICTS = {
    0: [(True, True, False), (True, True, False), (True, True, False)],
    1: [(False, False, False), (True, False, True), (True, True, True)],
    2: [(True, False, True), (False, False, False), (True, True, False)],
}


def response(step: int, row: int, verdict: tuple[bool, bool, bool], word: str) -> dict:
    valid, correct, leaky = verdict
    n = {"role": ["perception", None], "kl": [0.25, None], "student_logp": [-1.0, None], "teacher_logp": [-2.0, None]}
    out = {"key": f"{step}/{row}", "step": step, "row": row, "tokens": [word, f"said-{step}"], **n}
    out |= {"is_valid": valid, "invalid_reason": None if valid else "no_answer", "answer": word}
    return out | {"is_correct": correct, "is_leaky": leaky}


def write_run(workdir: pathlib.Path, *, steps: int = 40, word: str = "red") -> pathlib.Path:
    """Files as a run leaves them, each ending in a torn line; returns the page."""
    workdir.mkdir()
    (workdir / "config.json").write_text(to_json(base.get_config()))
    metrics = [
        {"step": i, "perception/loss": 1 / i, "reasoning/loss": None, "valid_rate": 0.5, "seconds/rollout": 0.1}
        | {"seconds/update": 0.2, "tokens_per_second": 100.0 * i, "skipped": float(i == 7), "alerts": int(i > 30)}
        | {"accuracy": 0.5 + 0.1 * (i % 2), "loss": 0.25, "entropy": 0.125, "completion_tokens": 30.0}
        | {"skipped_steps": int(i >= 7), "bad_rows": 3, "grad_norm": None if i == 7 else 1.0, "compilations": i == 1}
        for i in range(1, steps + 1)
    ]
    asked = [
        {"key": f"row/{i}", "row": i, "id": f"id-{i}", "problem": word, "reference": word, "picture": PICTURE}
        | {"bad_reason": None}
        for i in VERDICTS
    ]
    asked.append({**asked[0], "key": "row/3", "row": 3, "id": "id-3", "picture": "", "bad_reason": "image_missing"})
    shots = [response(step, i, v[k], word) for k, step in enumerate(STEPS) for i, v in VERDICTS.items()]
    shots += [{"key": f"{step}/3", "step": step, "row": 3} for step in STEPS]
    evals = [{"step": 20, "demo/avg": 50.0, "demo/score": 40.0, "demo/prior": 60.0}]
    for name, rows in (("metrics", metrics), ("report", [*asked, *shots]), ("eval", evals)):
        (workdir / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 9')
    write_run_page(workdir)
    return workdir / "report.html"


def test_a_run_that_has_not_begun(tmp_path):
    (tmp_path / "config.json").write_text(to_json(base.get_config()))
    write_run_page(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Step 0 of 80" in page and "reload the page" in page and "<svg" not in page


def test_what_the_page_has(tmp_path):
    page = write_run(tmp_path / "run").read_text()
    charts = ("Accuracy", "Loss by role", "Format and leak", "Benchmarks", "Demo")
    charts += ("Entropy", "Length", "Gradient norm", "Step time", "Speed")
    assert re.findall("<h3>(.*)</h3>", page) == list(charts)
    heads = ("Is it learning?", "Is it healthy?", "How fast is it?", "What does it say?")
    assert re.findall("<h2>(.*)</h2>", page) == list(heads)
    assert "Clipped" not in page and "Staleness" not in page  # no row has them
    assert page.count('class="area pale"') == 1  # how sure the accuracy is
    assert "Step 40 of 80" in page and "Unusable rows so far: 3" in page and "changed nothing: 1" in page
    assert page.count("<svg viewBox") == 10
    # All but those of benchmarks, which have step 20 alone, show what happened: by a line, and among a step's numbers.
    assert page.count("a step that changed nothing: 7</title>") == 2 * 8
    assert page.count("out of its bounds: from step 31</title>") == 2 * 8
    assert "optimizer.learning_rate = 0.0003\n" in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    before = (tmp_path / "run" / "report.html").read_bytes()
    write_run_page(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_of_a_long_run_the_page_shows_some_snapshots_and_reads_no_others(tmp_path):
    page = write_run(tmp_path / "run")
    short = page.stat().st_size
    lines = (tmp_path / "run" / "report.jsonl").read_text().splitlines()[:4]  # what was asked
    for step in range(0, 2001, 20):
        lines += [json.dumps(response(step, i, v[0], f"word-{step}")) for i, v in VERDICTS.items()]
    hidden = next(i for i, line in enumerate(lines) if line.startswith('{"key": "20/'))
    lines[hidden] = '{"key": "20/0", and nothing that could be read'
    (tmp_path / "run" / "report.jsonl").write_text("\n".join(lines) + "\n")
    write_run_page(tmp_path / "run")
    text = page.read_text()
    shown = sorted({int(n) for n in re.findall(r"word-(\d+)", text)})
    assert len(shown) == run_page.MAX_SHOTS and shown[0] == 0 and shown[-1] == 2000
    assert max(b - a for a, b in itertools.pairwise(shown)) == 100  # evenly: 80 or 100 steps apart
    assert "25 of 101 snapshots" in text and page.stat().st_size < 3 * short


def test_a_peak_does_not_flatten_the_rest(tmp_path):
    write_run(tmp_path / "run")
    losses = [0.25] * 70 + [4.0] + [0.25] * 9
    rows = [{"step": i + 1, "perception/loss": x, "grad_norm": 0.5} for i, x in enumerate(losses)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_run_page(tmp_path / "run")
    loss, norm = (tmp_path / "run" / "report.html").read_text().split("<h3>Gradient norm")
    assert "Cut off above; the largest is 4." in loss and "Cut off above" not in norm
    assert ">0.4</text>" in loss and ">4</text>" not in loss.split("<h3>Loss by role")[1]


def test_results_stand_in_a_table(tmp_path):
    write_run(tmp_path / "run")
    numbers = {"questions": 9, "score": 0.25, "prior": 0.5, "valid": 1.0, "description_accuracy": 0.5, "leak": 0.125}
    results = {"base": numbers, "trained": numbers | {"score": 0.75}}
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    write_run_page(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<td>Score</td><td>0.250</td><td>0.750</td>" in page


def drive(page: pathlib.Path, script: str, profile: pathlib.Path) -> tuple[str, str]:
    """Lets the page run `script` too, which its policy forbids to anyone but a test."""
    html, n = re.subn(r"script-src 'sha256-[^']+'", "script-src 'unsafe-inline'", page.read_text())
    assert n == 1
    driven = page.with_name("driven.html")
    driven.write_text(html.replace("</body>", f"<script>{script}</script></body>"))
    return dump(driven, profile)


DRIVER = """
const said = [], slid = [], shown = () => [...document.querySelectorAll(".probe")].filter((p) => !p.hidden);
const press = (name) => document.querySelector(`button[data-filter=${name}]`).click();
const slider = document.querySelector("input[type=range]");
const slide = (i) => { slider.value = i; slider.dispatchEvent(new Event("input")); };
const note = () => said.push(shown().map((p) => p.querySelector(".title").textContent.slice(0, 4)).join(" "));
for (const i of [2, 1, 0]) {
  slide(i);
  const pair = document.querySelector(".pair").textContent.match(/said-\\d+/g);
  slid.push(document.querySelector(".step span").textContent, ...pair);
  for (const name of ["all", "invalid", "wrong", "leaky"]) { press(name); note(); }
  press("all");
  said.push(shown()[0].querySelector(".pair").textContent);
}
const span = document.querySelector(".tokens span");
said.push(span.title, getComputedStyle(span).borderBottomColor);
document.body.dataset.said = said.join("|");
document.body.dataset.slid = slid.join(" ");
"""


@needs_browser
def test_filters_and_slider(tmp_path):
    document, console = drive(write_run(tmp_path / "run"), DRIVER, tmp_path / "profile")
    assert console == ""
    said = re.search(r'data-said="([^"]*)"', document)[1].split("|")
    slid = "step 40 said-0 said-40 step 20 said-0 said-20 step 0 said-0"
    assert f'data-slid="{slid}"' in document
    assert said[:4] == ["id-0 id-1 id-2 id-3", "", "", "id-1"]  # step 40
    assert said[5:9] == ["id-0 id-1 id-2 id-3", "id-2", "id-1 id-2", "id-1"]  # step 20
    assert said[10:14] == ["id-0 id-1 id-2 id-3", "id-1", "id-1 id-2", "id-2"]  # step 0
    for text, steps in zip((said[4], said[9], said[14]), ((0, 40), (0, 20), (0,)), strict=True):
        assert re.findall(r"said-(\d+)", text) == [str(s) for s in steps]
        assert ("step 0, base" in text) and (steps[-1] == 0 or f"step {steps[-1]}" in text)
    assert said[15] == "perception: divergence 0.25, probability 0.37 by student, 0.14 by teacher"
    assert said[16] == "rgb(0, 90, 181)"


READER = """
const svg = document.querySelectorAll(".chart > svg")[1], said = [], at = svg.parentElement.querySelector(".at");
const press = (key) => { svg.dispatchEvent(new KeyboardEvent("keydown", { key })); said.push(at.textContent); };
for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft", "End", "ArrowRight", "Home", "a"]) press(key);
svg.querySelectorAll(".column")[4].dispatchEvent(new PointerEvent("pointerenter"));
said.push(at.textContent, String(svg.querySelectorAll(".chosen").length));
svg.dispatchEvent(new PointerEvent("pointerleave"));
said.push(at.textContent);
document.body.dataset.said = said.join("|");
"""


@needs_browser
def test_a_charts_numbers_by_keys_and_pointer(tmp_path):
    document, console = drive(write_run(tmp_path / "run"), READER, tmp_path / "profile")
    assert console == ""
    said = re.search(r'data-said="([^"]*)"', document)[1].split("|")
    steps = [re.match(r"step (\d+) · perception", text)[1] for text in said[:-2]]
    assert steps == ["1", "2", "1", "1", "40", "40", "1", "1", "5"] and said[-2:] == ["1", ""]


def test_what_a_chart_shows_is_said_in_words(tmp_path):
    page = write_run(tmp_path / "run").read_text()
    label = "Loss by role, nats per token: perception 1 at step 1, 0.025 at 40"
    assert f'tabindex="0" aria-label="{label}"' in page


@needs_browser
def test_hostile_texts_stay_texts(tmp_path):
    """The page itself, with its policy: nothing on its console, and every text is there as it is."""
    document, console = dump(write_run(tmp_path / "run", word=HOSTILE), tmp_path / "profile")
    assert console == "" and "<title>Run run</title>" in document
    assert document.count('<div class="question">&lt;/script&gt;&lt;script&gt;document.title') == 4
    assert len(re.findall(r"<span [^>]*>&lt;/script&gt;&lt;script&gt;document.title", document)) == 2 * 3
    assert document.count("<img") == 3 and document.count("<script") == 2


@needs_browser
@pytest.mark.parametrize("planted", ["<script>document.title = 'taken'</script>", "<b onclick='1'>x</b>"])
def test_the_policy_holds_without_escaping(tmp_path, planted):
    """What would be in the page if an escape were forgotten does not run."""
    page = write_run(tmp_path / "run")
    page.write_text(page.read_text().replace("<body>", "<body>" + planted))
    document, console = dump(page, tmp_path / "profile")
    assert "<title>Run run</title>" in document
    assert ("Content Security Policy" in console) or "onclick" in planted


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("config.json", '{"vocab_size": 5}', "must be a run's config, as a run writes it: it lacks batch_size"),
        ("config.json", "[]", "must hold a JSON object"),
        ("results.json", "{", "must be valid JSON"),
    ],
)
def test_what_is_no_run(tmp_path, name, text, said, capsys):
    write_run(tmp_path / "run")
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(InputError, match=said):
        write_run_page(tmp_path / "run")
    assert main.main(["vigos_jax", "--mode=report", f"--workdir={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("results", [{"base": None}, {"trained": []}, {"x": 1}, {"trained": {"score": "much"}}])
def test_odd_results_and_metrics_leave_gaps(tmp_path, results):
    page = write_run(tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    odd = {"step": 41, "bad_rows": None, "alerts": "many", "loss": math.nan, "perception/loss": 10**400}
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps(odd | {"accuracy": math.inf, "seconds/rollout": True}) + "\n")
    write_run_page(tmp_path / "run")
    shapes = re.findall(r' d="([^"]*)"', page.read_text())
    assert shapes and not any(word in path for path in shapes for word in ("nan", "inf"))


def test_torn_lines_cost_their_rows_only(tmp_path):
    write_run(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b'\xff\n{"loss": 1}\n' + before)
    assert write_run_page(tmp_path / "run") == tmp_path / "run" / "report.html"
    page = (tmp_path / "run" / "report.html").read_text()
    (tmp_path / "run" / "metrics.jsonl").write_bytes(before)
    write_run_page(tmp_path / "run")
    assert page == (tmp_path / "run" / "report.html").read_text()
