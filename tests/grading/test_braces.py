"""Brace matching in text and bytes."""

import pytest

from vigos_jax.grading.braces import closing_brace, is_balanced


@pytest.mark.parametrize("text, end", [("a}", 1), ("a{b}c}d", 5), ("{}{}}", 4), ("a", None), ("{a}", None), ("", None)])
def test_closing_brace(text, end):
    assert closing_brace(text, 0) == closing_brace(text.encode(), 0) == end
    assert closing_brace("}}" + text, 2) == (None if end is None else end + 2)


@pytest.mark.parametrize("text, balanced", [("", True), ("{a{b}}", True), ("}{", False), ("{", False), ("{}}", False)])
def test_is_balanced(text, balanced):
    assert is_balanced(text) is balanced
