"""Braces in text and in bytes."""

import re

_TEXT, _BYTES = re.compile(r"[{}]"), re.compile(rb"[{}]")


def closing_brace(text: str | bytes, start: int) -> int | None:
    """Offset of the brace that closes one opened just before `start`; None if it is never closed."""
    depth = 1
    braces = _TEXT.finditer(text, start) if isinstance(text, str) else _BYTES.finditer(text, start)
    for brace in braces:
        depth += 1 if brace[0] in ("{", b"{") else -1
        if depth == 0:
            return brace.start()
    return None


def is_balanced(text: str) -> bool:
    """Whether every brace is closed, and none before it is opened."""
    depth = 0
    for brace in _TEXT.finditer(text):
        depth += 1 if brace[0] == "{" else -1
        if depth < 0:
            return False
    return depth == 0
