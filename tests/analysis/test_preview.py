"""--mode data: what it says of rows, and that it is what a run will read."""

import json

import pytest
from helpers import make_processor_folder
from PIL import Image
from tiny_rows import write_jsonl

from configs import base
from vigos_jax.analysis.preview import preview
from vigos_jax.data.loader import make_batches, order_of
from vigos_jax.main import main
from vigos_jax.rollouts.parse import Reader
from vigos_jax.session import open_source

ARGUMENTS = ("--config.batch_size=4", "--config.preview.rows=8", "--config.preview.shown=1")


def config_of(**fields):
    config = base.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


@pytest.fixture
def rows(tmp_path):
    Image.new("RGB", (640, 480), "red").save(tmp_path / "a.png")
    good = [{"question": f"<image>Which color is part {i}?", "solution": "red", "image": "a.png"} for i in range(9)]
    bad = [good[0] | {"image": "no.png", "id": "lost"}, good[0] | {"question": "<image><image> Q?"}]
    return write_jsonl(tmp_path / "rows.jsonl", [*good, *bad])


def said(capsys, *arguments):
    code = main(["main", "--config", "configs/base.py", "--mode", "data", *ARGUMENTS, *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_rows_of_a_file(capsys, rows, tmp_path):
    page = tmp_path / "out"
    code, out, err = said(
        capsys, f"--config.data.source={rows}", "--config.preview.rows=200", f"--config.preview.output={page}"
    )
    assert code == 1  # some rows are bad
    assert "problem from question, answer from solution, images from image" in out
    assert "11 read" in out and "9 usable" in out
    assert "1 bad: image_missing; line 10, id 'lost': 'no.png' is not a file in " in out
    assert "1 bad: image_markers; line 11, id '10': the question has 2 <image>, the row 1 image(s)" in out
    student = out.index("student: ")
    assert "visual tokens]" in out[student:] and "Which color is part" in out[student:]
    assert "perception: " in out and "Reference answer: red" in out
    text = (page / "data.html").read_text()
    assert "data:image/" in text and "Which color is part" in text and "image_missing" in text


def test_what_is_shown_is_what_a_run_reads(capsys, rows):
    code, out, _ = said(capsys, f"--config.data.source={rows}", "--config.preview.rows=4", "--config.data.workers=0")
    config = config_of(batch_size=4, data__source=str(rows))
    reader = Reader.of_folder(config)
    encoder = reader.encoder(max_completion=config.sampling.max_tokens)
    batch = next(make_batches(open_source(config), encoder, order_of(config)))
    first = next(e for e in batch if e.bad_reason is None)
    assert f"id {first.id}: " in out and first.problem in out


def test_padding_is_counted(capsys, rows):
    """Four rows of 9 visual tokens in one bucket: by hand."""
    code, out, _ = said(capsys, "--config.preview.rows=4", "--config.buckets.prompt=(100,)")
    line = next(line for line in out.splitlines() if line.startswith("config.buckets.prompt"))
    config = config_of(batch_size=4)
    reader = Reader.of_folder(config)
    batch = next(make_batches(open_source(config), reader.encoder(max_completion=48), order_of(config)))
    tokens = sum(len(reader.row(e).prompt.ids) for e in batch)
    assert line.split() == ["config.buckets.prompt", f"{100 - tokens / 4:.0f}", "%", "100"] and code == 0


def test_options_that_nobody_is_shown_are_said(capsys, rows):
    row = json.loads(rows.read_text().splitlines()[0]) | {"choices": ["red", "blue"]}
    path = write_jsonl(rows.parent / "options.jsonl", [row] * 3)
    _, out, _ = said(capsys, f"--config.data.source={path}")
    assert "3 with options, which are not appended to the question (config.data.options_template)" in out
    _, out, _ = said(capsys, f"--config.data.source={path}", "--config.data.options_template={letter}. {option}")
    assert "not appended" not in out and "A. red\n    B. blue" in out


def test_all_rows_bad(capsys, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"problem": "Q?", "answer": "a", "image": "no.png"}] * 3)
    code, out, _ = said(capsys, f"--config.data.source={path}")
    assert code == 1 and "0 usable" in out and "3 bad: image_missing" in out


def test_images_that_are_made_smaller_are_counted(capsys, rows):
    folder = make_processor_folder(rows.parent / "model", max_pixels=400_000)
    arguments = (f"--config.data.source={rows}", f"--config.model.path={folder}")
    code, out, _ = said(capsys, *arguments, "--config.buckets.patches=(256,)")
    assert "with images made smaller to fit config.buckets" in out and "patches_too_long" not in out
    code, out, _ = said(capsys, *arguments)
    assert "made smaller" not in out and "image grid 1 x 34 x 46" in out


def test_errors_are_one_line(capsys, tmp_path):
    code, out, err = said(capsys, f"--config.data.source={tmp_path / 'no.jsonl'}")
    assert code == 2 and err.count("\n") == 1 and "does not exist" in err
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": 1}])
    code, out, err = said(capsys, f"--config.data.source={path}")
    assert code == 2 and err.count("\n") == 1 and json.dumps("q").strip('"') in err


def test_preview_of_a_run(capsys, tmp_path):
    config = config_of(batch_size=4, preview__rows=4)
    text, bad = preview(config, tmp_path)
    assert bad == 0 and (tmp_path / "data.html").exists() and text.startswith("demo: ")
