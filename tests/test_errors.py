"""Every refusal is one line with a value and advice: conftest checks those that the suite meets, here the check is."""

import ast
import pathlib
import re

import pytest
from error_form import ADVICE, fault

from vigos_jax.errors import InputError


@pytest.mark.parametrize(
    "message, wrong",
    [
        ("config.steps=0 must be at least 1", None),
        ("/data/rows.jsonl lacks answer; it has the columns problem, images", None),
        ("cannot read /data/rows.jsonl: Permission denied", "says neither"),
        ("config.steps=0 is bad", "says neither"),
        ("something must be done", "shows no value"),
        ("config.steps=0\nmust be at least 1", "several lines"),
        ("config.steps=0 must be " + "x" * 3000, "characters"),
    ],
)
def test_the_form(message, wrong):
    found = fault(message)
    assert found is None if wrong is None else wrong in found


def test_a_refusal_out_of_form_fails_the_test_that_meets_it():
    with pytest.raises(AssertionError, match="out of form, it says neither .*: config.steps=0 is bad"):
        raise InputError("config.steps=0 is bad")


PARTS = r"\{(?:choices|_HINT|hint|advice)"  # what a message is put together from
# Words of others, which are checked where they are made.
HANDED_ON = {"'; '.join(failures)", "f'{unwell}; {saved}'", "f'{where}: {e}'"}


def messages() -> list[tuple[str, str]]:
    """(place, the source of the message) of every refusal that the package can make."""
    root = pathlib.Path(__file__).resolve().parents[1]
    found = []
    for path in sorted((root / "vigos_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "InputError" and node.args:
                found.append((f"{path.relative_to(root)}:{node.lineno}", ast.unparse(node.args[0])))
    return found


def test_every_refusal_in_the_source_gives_advice():
    """Also those that no test meets: in the words of the message itself, or in a part that it is put together from."""
    named = [(place, text) for place, text in messages() if text not in HANDED_ON]
    assert len(named) > 150
    without = [f"{place}: {text}" for place, text in named if not ADVICE.search(text) and not re.search(PARTS, text)]
    assert not without, "\n".join(without)
