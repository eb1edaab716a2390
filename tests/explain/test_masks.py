"""The drawings of packed masks: those in docs/ are what the code draws, and they show who attends to whom."""

import importlib
import pathlib
import re

import pytest

from vigos_jax.explain.masks import drawing, main
from vigos_jax.method.roles import role_table

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "docs" / "masks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.svg"))


def table(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    return role_table(config.roles, config.prompts)


def test_there_is_a_gallery():
    assert set(NAMES) >= {"base", "opsd", "vision_opd", "opd", "va_opd", "big_teacher", "text_only_teacher"}


@pytest.mark.parametrize("name", NAMES)
def test_drawings_are_what_the_code_draws(name, tmp_path):
    main(str(tmp_path), name)
    assert (tmp_path / f"{name}.svg").read_text() == (FOLDER / f"{name}.svg").read_text(), (
        "python -m vigos_jax.explain.masks"
    )


def test_what_they_show():
    """Titles say whose weights and which image; the branch of perception sees the prefix and itself alone."""
    titles = {name: re.findall(r'bold">([^<]*)<', drawing(table(name))) for name in NAMES}
    assert titles["base"] == ["student", "base weights, image: original"]
    assert titles["vision_opd"] == ["student", "base weights, image: crop"]
    assert titles["text_only_teacher"] == ["student", "base weights, image: original", "base weights, no image"]
    large = "Qwen/Qwen3-VL-8B-Instruct"
    assert titles["va_opd"] == ["student", f"{large}, image: original", f"{large}, no image"]
    svg = drawing(table("base"))
    teachers = svg[svg.index("base weights") :]
    rows = re.findall(r'<rect x="(\d+)" y="(\d+)" width="(\d+)" height="5" fill="([^"]*)" opacity="([^"]*)"', teachers)
    by_row = {}
    for x, y, width, colour, strength in rows:
        by_row.setdefault((int(y), colour, strength), []).append((int(x), int(width)))
    last = {colour: runs for (_, colour, _), runs in by_row.items()}
    perception, reasoning = last["#0072b2"], last["#d55e00"]
    assert len(perception) == 1 and len(reasoning) == 2, "a gap where perception's branch stands"
    assert reasoning[0][1] == 10 * 6, "header and image"
    assert sum(s == "1" for (_, colour, s) in by_row if colour == "#0072b2") == 4, (
        "as many as the description has tokens"
    )
