r"""Coverage-guided fuzzing of the span finder and the graders with atheris, which is not in the test extra.

    pip install atheris
    PYTHONPATH=.:tests python tests/stress/fuzz_atheris.py spans|graders [-max_total_time=SECONDS] [-runs=N] [FOLDER]

Further arguments are libFuzzer's; FOLDER keeps the inputs that reached new code. It ends with the number of inputs
tried; a failure prints the traceback and the input, and is kept in a file crash-*.
"""

import sys

import atheris

with atheris.instrument_imports(include=["vigos_jax.method.spans", "vigos_jax.grading"]):
    from vigos_jax.grading import answer_text, choice, options, reading, rules
    from vigos_jax.method import spans

from fuzz import ANSWER_PIECES, PIECES
from oracles.spans_oracle import parse


def try_spans(data: bytes) -> None:
    """Tokens: a byte names a piece, or is one; every third bit or so ends the token."""
    source = atheris.FuzzedDataProvider(data)
    tokens = [b""]
    while source.remaining_bytes() and len(tokens) < 60:
        choice = source.ConsumeIntInRange(0, len(PIECES) + 6)
        tokens[-1] += PIECES[choice] if choice < len(PIECES) else source.ConsumeBytes(1)
        if source.ConsumeIntInRange(0, 2) == 0:
            piece = tokens[-1]
            cut = source.ConsumeIntInRange(0, len(piece))  # tokens need not end where pieces do
            tokens[-1:] = [piece[:cut], piece[cut:]]
    found, released, expected = spans.find_spans(tokens), spans.find_spans(tokens, rule="released"), parse(tokens)
    assert found.is_valid == (expected is not None) == (found.invalid_reason is None)
    assert released.is_valid or not found.is_valid
    parts = (found.description, found.reasoning, found.answer)
    edges = [edge for part in parts for edge in part]
    assert edges == sorted(edges) and 0 <= edges[0] and edges[-1] <= len(tokens)
    if expected is not None:
        assert tuple({i for i in range(*part) if tokens[i]} for part in parts) == expected


def try_graders(data: bytes) -> None:
    source = atheris.FuzzedDataProvider(data)

    def text() -> str:
        out = []
        for _ in range(source.ConsumeIntInRange(0, 14)):
            choice = source.ConsumeIntInRange(0, len(ANSWER_PIECES) + 4)
            out.append(ANSWER_PIECES[choice] if choice < len(ANSWER_PIECES) else source.ConsumeUnicode(3))
        return "".join(out)

    a, b, texts = text(), text(), [text() for _ in range(source.ConsumeIntInRange(0, 3))]
    assert reading.agree(reading.read(a), reading.read(b)) == reading.agree(reading.read(b), reading.read(a))
    says = answer_text.normalize_answer(a) != ""
    assert rules.grade(a, a).is_correct == says == (answer_text.answer_kind(a) != "")
    answer_text.last_boxed(a), answer_text.mentions(a, b), options.parse_options(a)
    choice.option_index(a, texts)
    precision = source.ConsumeIntInRange(-1, 4)
    verdict = rules.grade(a, b, options=texts, precision=None if precision < 0 else precision)
    assert verdict.grader in rules.GRADERS


TARGETS = {"spans": try_spans, "graders": try_graders}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(__doc__)
    atheris.Setup([sys.argv[0], "-print_final_stats=1", *sys.argv[2:]], TARGETS[sys.argv[1]])
    atheris.Fuzz()
