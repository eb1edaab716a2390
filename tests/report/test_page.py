"""Pages: self-contained, and nothing that a model or a data set says is taken for markup."""

import gc
import re
import weakref

import numpy as np
import pytest
from browser import dump, needs_browser
from PIL import Image

from vigos_jax.report.charts import Chart, Line
from vigos_jax.report.page import Charts, Rollout, Table, Text, Token, image_uri, mix, render, write_page

HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\"> & \"q\" 's'"


def page(text=HOSTILE):
    picture = image_uri(Image.fromarray(np.full((9, 12, 3), 200, np.uint8)))
    tokens = [Token("plain "), Token(text, (255, 0, 10), 0.5, text)]
    table = Table(text, ["name", text], [[text, "1.5"], ["row", "22.25"]], note=text)
    return [Text(["A line.", text]), table, Rollout(text, text, tokens, [picture], "wrong")]


def test_text_is_escaped():
    html = render(HOSTILE, page())
    assert "<script" not in html and "<img src=x" not in html
    assert html.count("&lt;script&gt;") == 11
    assert "rgba(255,0,10,0.500)" in html


def test_nothing_is_fetched():
    html = render("A page", page("text"))
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', html) == []
    assert "http" not in html.replace("http-equiv", "")


def test_colors_are_numbers():
    assert Token("x", (999, -5, 3.7), 7.0).background == "rgba(255,0,3,1.000)"
    assert mix((0, 100, 200), (100, 0, 200), 0.25) == (25, 75, 200)


def test_table_for_a_terminal():
    text = Table("Title", ["name", "value"], [["a", "1.5"], ["long name", "22.25"]], note="a note").text()
    assert text.splitlines() == ["Title", "name       value", "a            1.5", "long name  22.25", "a note"]


def test_a_ragged_table_is_an_error():
    with pytest.raises(ValueError):
        Table("Title", ["name", "value"], [["a"]])


def test_half_a_surrogate_pair_can_be_written(tmp_path):
    write_page(tmp_path / "page.html", "A page", [Text(["\ud800 text"])])
    assert "text" in (tmp_path / "page.html").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_a_page_that_is_written_leaves_nothing_in_memory(tmp_path):
    gc.disable()  # nobody else shall find it
    try:
        charts = Charts("charts", [Chart("chart", [Line("a", [(0, 0.0), (10, 1.0)], (200, 0, 0))])])
        sections = [Text(["word"]), charts]
        seen = [weakref.ref(section) for section in sections]
        write_page(tmp_path / "page.html", "title", sections)
        del charts, sections
        assert [reference() for reference in seen] == [None, None]
    finally:
        gc.enable()


def test_thumbnails_are_small():
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8)
    assert len(image_uri(Image.fromarray(noise))) < 100_000


@needs_browser
def test_a_browser_shows_it_as_text(tmp_path):
    write_page(tmp_path / "page.html", "A page", page())
    document, said = dump(tmp_path / "page.html", tmp_path / "profile")
    assert "<title>A page</title>" in document and said == ""
    assert "&lt;script&gt;document.title" in document and document.count("<img") == 1
