"""The page of all runs: what it finds, what it says of each, and two of them compared in a browser."""

import json
import os
import re

import pytest
from browser import needs_browser
from test_run_page import HOSTILE, drive, dump, write_run

from vigos_jax import main
from vigos_jax.errors import InputError
from vigos_jax.report.index_page import find_runs, write_index


@pytest.fixture
def folder(tmp_path):
    """runs/first and runs/deep/er/second, of other seeds and lengths; and what is no run."""
    runs = tmp_path / "runs"
    (runs / "deep" / "er").mkdir(parents=True)
    write_run(runs / "first")
    write_run(runs / "deep" / "er" / "second", steps=400)
    config = json.loads((runs / "first" / "config.json").read_text())
    (runs / "first" / "config.json").write_text(json.dumps(config | {"seed": 5}))
    (runs / "deep" / "er" / "second" / "report.html").unlink()
    (runs / "first" / "results.json").write_text(json.dumps({"base": {"score": 0.5}, "trained": {"score": 0.75}}))
    (runs / "first" / "checkpoints").mkdir()
    for name in ("config.json", "metrics.jsonl"):  # inside a run there is no other
        (runs / "first" / "checkpoints" / name).write_text("{}")
    (runs / "not_a_run").mkdir()
    (runs / "not_a_run" / "config.json").write_text("{}")
    return runs


def test_which_folders_are_runs(folder):
    names = {path.relative_to(folder).as_posix() for path in find_runs(folder)}
    assert names == {"first", "deep/er/second"}
    (folder / "linked").symlink_to(folder / "first")
    (folder / "circle").symlink_to(folder)
    names = {path.relative_to(folder).as_posix() for path in find_runs(folder)}
    assert {"first", "linked", "deep/er/second", "circle/first"} <= names


def test_a_line_for_each_run(folder):
    page = write_index(folder).read_text()
    rows = re.findall(r"<tr><td>.*?</tr>", page, flags=re.DOTALL)
    texts = [re.sub(r"<[^>]*>", "|", row) for row in rows]
    assert [text.strip("| ").split("|")[0] for text in texts] == ["deep/er/second", "first"]
    assert "|40 of 80||0.55||0.25||0.5||0.75||3||1|" in texts[1]
    assert "|400 of 80||0.55||0.25||0.5||-||3||1|" in texts[0]
    assert '<a href="first/report.html">first</a>' in rows[1] and "<a " not in rows[0]
    before = (folder / "index.html").read_bytes()
    write_index(folder)
    assert (folder / "index.html").read_bytes() == before and not list(folder.glob("*.tmp"))


def test_a_run_that_cannot_be_read_does_not_hide_the_others(folder):
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    (folder / "broken" / "metrics.jsonl").write_text("")
    (folder / "odd").mkdir()
    (folder / "odd" / "config.json").write_text((folder / "first" / "config.json").read_text())
    (folder / "odd" / "metrics.jsonl").write_text(json.dumps({"step": 1, "bad_rows": None, "accuracy": "high"}) + "\n")
    (folder / "odd" / "results.json").write_text('{"trained": null}')
    (folder / "odd" / "report.html").write_text("")
    os.rename(os.fsencode(folder / "odd"), os.fsencode(folder) + b"/\xff")
    page = write_index(folder).read_text()
    assert "Not read: broken: " in page and page.count("<tr><td>") == 3 and 'href="%FF/report.html"' in page


def test_numbers_that_are_none_are_gaps(folder):
    rows = [{"step": i, "accuracy": None if i == 3 else 0.5, "grad_norm": "much"} for i in range(1, 6)]
    (folder / "first" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_index(folder).read_text()
    data = json.loads(re.search(r'comparison-data">(.*?)</script>', page, flags=re.DOTALL)[1])
    (first,) = [run for run in data["runs"] if run["name"] == "first"]
    assert [y for _, y, _ in first["curves"]["Accuracy"]] == [0.5, 0.5, None, 0.5, 0.5]
    assert "Gradient norm" not in first["curves"]


COMPARER = """
const boxes = [...document.querySelectorAll(".runs input")], root = document.querySelector(".comparison");
const found = [], look = () => found.push([...root.querySelectorAll("h3")].map((h) => h.textContent).join(","),
  [...root.querySelectorAll("tbody tr")].map((r) => r.textContent).join(","),
  String(root.querySelectorAll(".line:not(.pale)").length), String(boxes.filter((b) => b.checked).length));
look();
boxes[0].click();
look();
boxes[1].click();
look();
const colors = () => boxes.map((b) => b.nextElementSibling.style.background);
boxes[0].click();
boxes[1].click();
const before = colors()[1];
boxes[0].click();
const after = colors()[1];
boxes[0].click();
found.push(before, after, colors()[0]);
found.push([...root.querySelectorAll(".line:not(.pale)")].at(-1).getAttribute("d"));
document.body.dataset.said = found.join("|");
"""


@needs_browser
def test_curves_and_configs_are_compared(folder, tmp_path):
    """At first the first two are chosen; then one, of which there is nothing to compare; then none."""
    document, console = drive(write_index(folder), COMPARER, tmp_path / "profile")
    assert console == ""
    said = re.search(r'data-said="([^"]*)"', document)[1].split("|")
    titles = "Accuracy,Loss,Valid format,Entropy,Length,Gradient norm,Benchmark demo"
    assert said[:4] == [titles, "seed05", "14", "2"] and said[4:8] == [titles, "", "7", "1"]
    assert said[8:12] == ["", "", "0", "0"]
    assert said[12] == said[13] != said[14]  # a run keeps its color while others come and go
    assert re.match(r"M[\d.]+,[\d.]+h3$", said[15])  # of one evaluation a dash


def test_few_points_are_not_smoothed(folder):
    evals = [{"step": 10 * i, "demo/avg": y} for i, y in enumerate([40.0, 50.0, 60.0, 70.0, 90.0], start=1)]
    (folder / "first" / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evals))
    page = write_index(folder).read_text()
    data = json.loads(re.search(r'comparison-data">(.*?)</script>', page, flags=re.DOTALL)[1])
    (first,) = [run for run in data["runs"] if run["name"] == "first"]
    assert [mean for _, _, mean in first["curves"]["Benchmark demo"]] == [40.0, 50.0, 60.0, 70.0, 90.0]
    assert first["curves"]["Accuracy"][0][1:] != first["curves"]["Accuracy"][0][2:]


@needs_browser
def test_hostile_texts_stay_texts(folder, tmp_path):
    config = json.loads((folder / "first" / "config.json").read_text())
    (folder / "first" / "config.json").write_text(json.dumps(config | {"seed": HOSTILE}))
    document, console = dump(write_index(folder), tmp_path / "profile")
    assert console == "" and "<title>Runs in runs</title>" in document and "<img" not in document
    assert "document.title='taken'" in document.split("what differs")[1]


def test_the_mode(folder, capsys, monkeypatch):
    assert main.main(["vigos_jax", "--mode=report", f"--workdir={folder}"]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "index.html")
    (folder / "first" / "report.html").unlink()
    assert main.main(["vigos_jax", "--mode=report", f"--workdir={folder / 'first'}"]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "first" / "report.html")
    assert (folder / "first" / "report.html").is_file()
    monkeypatch.chdir(folder.parent)
    (folder / "index.html").unlink()
    assert main.main(["vigos_jax", "--mode=report"]) == 0 and (folder / "index.html").is_file()


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_folder_without_runs(name, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no run"):
        write_index(tmp_path / name)
    assert main.main(["vigos_jax", "--mode=report", f"--workdir={tmp_path / name}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path / name) in said
