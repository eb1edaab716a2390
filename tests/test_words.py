"""The words of this project: one name for a thing, plain English. Prose that says it otherwise is found here."""

import ast
import io
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("vigos_jax", "configs", "docs", "benchmarks", "notebooks")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "Makefile", "setup.py", "pyproject.toml")
SUFFIXES = (".py", ".md", ".j2", ".js", ".svg")

# What is not written, and what to write instead.
WORDS = {
    r"\bsick\b": "non-finite; nonfinite/",
    r"\bwhether a run is well\b": "run-health checks",
    r"\breader (?:that leaves|who left|has left)\b|\bnobody reads the output\b": "broken pipe",
    r"\bdeaf\b|\bdoes not hear\b": "ignore_signals",
    r"\bsame eyes\b": "share the vision tower",
    r"\bwho is applied with\b": "student and teacher parameters",
    r"\bwho else gets\b": "experiment trackers",
    r"\bnever lost and never made twice\b": "append-only, keyed by content hash",
    r"\bno run comes there\b": "reserved step index",
    r"\bnobody's business\b": "local paths are not published",
    r"\bwhat comes first counts\b": "keep the original exception",
    r"\bhold each other\b": "reference cycle",
    r"\bno memory of this program's own\b": "owned by the page cache",
    r"(?<!\.)\bpictures?\b": "image",
    r"\bhead_size\b": "head_dim",
    r"\bnothing is promised\b": "not evaluated",
    r"\boverlay\b": "teacher parameters",
    r"(?<!there )\b(?:is|are|was|were) no (?!(?:longer|more|less|fewer|faster|slower|such)\b)[a-z]": "is not a",
    r"\b(?:program|model|process|run|step|server|worker|code|test|loader)s? (?:knows?|wants?|hears?)\b": "has, needs",
}
# Where a word is data, not prose: `path: line's text`.
ALLOWED = {
    "vigos_jax/data/markers.py": ("picture",),  # words of questions
    "vigos_jax/grading/words.py": ("picture",),
    "vigos_jax/grading/reading.py": ("picture",),
}


def prose(path: str, text: str) -> list[tuple[int, str]]:
    """(line, text) of what people read: of code its comments and texts, of everything else all of it."""
    if not path.endswith(".py"):
        return list(enumerate(text.splitlines(), 1))
    out = [
        (token.start[0], token.string)
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    ]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.isidentifier():
            out += [(node.lineno + i, line) for i, line in enumerate(node.value.splitlines())]
    return sorted(out)


def word_faults(path: str, text: str) -> list[str]:
    """Every place where prose says what `WORDS` does not."""
    out = []
    for line, words in prose(path, text):
        for pattern, instead in WORDS.items():
            if match := re.search(pattern, words, re.I):
                if match[0].lower().startswith(ALLOWED.get(path, ("\0",))):
                    continue
                out.append(f"{path}:{line} says {match[0]!r}; write: {instead}")
    return out


def files() -> dict[str, str]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    found += [ROOT / page for page in PAGES]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(found)}


def test_prose_keeps_to_the_words_of_the_project():
    texts = files()
    assert {"vigos_jax/main.py", "docs/data.md", "README.md", "vigos_jax/report/page.js"} <= set(texts)
    found = [fault for path, text in texts.items() for fault in word_faults(path, text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "path, text",
    [
        ("docs/x.md", "Two pictures of a cat."),
        ("docs/x.md", "A line that is no row."),
        ("docs/x.md", "ids that are no control tokens"),
        ("docs/x.md", "## Sick numbers"),
        ("vigos_jax/x.py", "x = 1  # the program knows it"),
        ("vigos_jax/x.py", 'def f():\n    """Nobody reads the output."""\n'),
        ("vigos_jax/x.py", 'raise ValueError(f"{x} is no picture")'),
        ("vigos_jax/x.py", '"""A\n\nhead_size of heads."""'),
        ("vigos_jax/report/x.js", "// a picture"),
    ],
)
def test_what_is_said_otherwise_is_found(path, text):
    assert word_faults(path, text)


@pytest.mark.parametrize(
    "path, text",
    [
        ("docs/x.md", "There is no such file, and the run is no longer there. It is not a row."),
        ("vigos_jax/x.py", "picture = first(row)  # the row's image"),
        ("vigos_jax/x.py", 'row["picture"] = 1'),
        ("vigos_jax/data/markers.py", 'NOUN = "image|picture"'),
        ("docs/x.md", "An image is no more than 80 megapixels."),
    ],
)
def test_what_is_said_well_is_not(path, text):
    assert word_faults(path, text) == []
