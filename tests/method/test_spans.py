"""The completion grammar and the token rule, case by case, and against an oracle that works on text."""

import json
import pathlib
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles.spans_oracle import parse

from vigos_jax.method.spans import find_spans

# Completions as byte-level tokenizers cut them; in "tokens" each character is one byte (Latin-1).
CASES = json.loads((pathlib.Path(__file__).parents[1] / "fixtures" / "spans.json").read_text())

D, T, U, B = b"</description>", b"<think>", b"</think>", b"\\boxed{"


def ranges(spans):
    return spans.description, spans.reasoning, spans.answer


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_tokenized_completions(case):
    spans = find_spans([token.encode("latin-1") for token in case["tokens"]])
    assert spans.invalid_reason == case.get("invalid_reason")
    assert spans.is_valid == ("invalid_reason" not in case)
    expected = [tuple(case.get(part, (0, 0))) for part in ("description", "reasoning", "answer")]
    assert list(ranges(spans)) == expected


@pytest.mark.parametrize(
    "text, reason",
    [
        (b"", "no_description_close"),
        (b"d<think>r</think>\\boxed{a}", "no_description_close"),
        (b"d</Description><think>r</think>\\boxed{a}", "no_description_close"),
        (b"d<think></description>r</think>\\boxed{a}", "no_think_open"),
        (b"d</description><think>r\\boxed{a}", "no_think_close"),
        (b"d</think></description><think>r\\boxed{a}", "no_think_close"),
        (b"d</description><think>r \\boxed{a}</think>", "no_box"),
        (b"d</description><think>r</think>\\boxed {a}", "no_box"),
        (b"d</description><think>r</think>boxed{a}", "no_box"),
        (b"d</description><think>r</think>\\boxed{a", "unclosed_box"),
        (b"d</description><think>r</think>\\boxed{{a}", "unclosed_box"),
        (b"d</description><think>r</think>\\boxed{\\{a}", "unclosed_box"),
        (b"d</description><think>r</think>\\boxed{ \\boxed{a}", "unclosed_box"),
        (b"</description><think>r</think>\\boxed{a}", "empty_description"),
        (b" \n\t\r\x0b\x0c</description><think>r</think>\\boxed{a}", "empty_description"),
        (b"d</description><think></think>\\boxed{a}", "empty_reasoning"),
        (b"d</description><think> \n </think>\\boxed{a}", "empty_reasoning"),
        (b"d</description><think>r</think>\\boxed{}", "empty_answer"),
        (b"d</description><think>r</think>\\boxed{} \\boxed{a}", "empty_answer"),  # the first box counts
        (b"d</description>x<think>r</think>\\boxed{a}", "text_between_parts"),
        (b"d</description></description><think>r</think>\\boxed{a}", "text_between_parts"),
        (b"d</description><think>r</think>$\\boxed{a}$", "text_between_parts"),
        (b"d</description><think>r</think></think>\\boxed{a}", "text_between_parts"),
        (b"d</description>\xc2\xa0<think>r</think>\\boxed{a}", "text_between_parts"),  # not ASCII white space
        (b"d</description>\x00<think>r</think>\\boxed{a}", "text_between_parts"),
    ],
)
def test_invalid(text, reason):
    for tokens in ([text], [text[i : i + 1] for i in range(len(text))]):
        spans = find_spans(tokens)
        assert (spans.is_valid, spans.invalid_reason) == (False, reason)
        assert ranges(spans) == ((0, 0),) * 3


@pytest.mark.parametrize(
    "text, answer",
    [
        (b"d</description><think>r</think>\\boxed{a}", b"a"),
        (b"d</description>\n\n<think>r</think>\x0b\x0c\\boxed{a}", b"a"),
        (b"d</description><think>r</think>\\boxed{ }", b" "),  # braces that enclose a space enclose something
        (b"d</description><think>r</think>\\boxed{\\frac{1}{2}}", b"\\frac{1}{2}"),
        (b"d</description><think>r</think>\\boxed{a\\}b}", b"a\\"),  # an escaped brace is a brace
        (b"d</description><think>r</think>\\boxed{{}}", b"{}"),
        (b"d</description><think>r</think>\\boxed{a}, \\boxed{b} </think>{", b"a"),  # anything may follow
        (b"d<description>d<think>d</think></description><think>r<think>r</think>\\boxed{a}", b"a"),
        (b"d</description><think>\\boxed{b} r</description></think>\\boxed{a}", b"a"),
        (b"\xff</description><think>\xa0</think>\\boxed{\x80}", b"\x80"),  # no UTF-8, and no white space
    ],
)
def test_valid_byte_by_byte(text, answer):
    spans = find_spans([text[i : i + 1] for i in range(len(text))])
    assert spans.is_valid and spans.invalid_reason is None
    assert text[slice(*spans.answer)] == answer
    start, end = spans.description
    assert start == 0 and text[end:].startswith(D)
    start, end = spans.reasoning
    assert text[:start].endswith(T) and text[end:].startswith(U)


@pytest.mark.parametrize(
    "tokens, expected",
    [
        # a token that overlaps a tag is a delimiter whatever else it holds
        ([b"d", b"d<", D[1:], T, b"r", b"r<", U[1:], B, b"a", b"}"], ((0, 1), (4, 5), (8, 9))),
        ([b"d", D[:-1], b"><", T[1:-1], b">r", b"r", U, b" " + B + b"a}"], ((0, 1), (5, 6), (7, 8))),
        ([b"d", D, T, b"r", U + B + b"a", b"a", b"}."], ((0, 1), (3, 4), (5, 6))),  # ... the answer too
        # the inside of the braces makes an answer token, the braces do not
        ([b"d", D + T, b"r", U, B, b"a", b"}"], ((0, 1), (2, 3), (5, 6))),
        ([b"d", D + T, b"r", U, b"\\boxed", b"{a", b"}"], ((0, 1), (2, 3), (5, 6))),
        ([b"d", D + T, b"r", U, b"\\boxed", b"{", b"a}."], ((0, 1), (2, 3), (6, 7))),
        ([b"d", D + T, b"r", U, b"\\boxed", b"{{", b"}", b"}"], ((0, 1), (2, 3), (5, 7))),
        # a part may be left without a token of its own
        ([b"d" + D + T + b"r" + U + B + b"a}"], ((0, 0), (1, 1), (1, 1))),
        ([b"d" + D, T + b"r", b"r" + U, B, b"a}"], ((0, 0), (2, 2), (4, 5))),
        # tokens without bytes: inside a part they belong to it, elsewhere they shift nothing
        ([b"", b"d", b"", D, b"", T, b"", b"r", b"", U, b"", B, b"", b"a", b"", b"a", b"", b"}", b""],
         ((0, 3), (6, 9), (13, 16))),
        ([b"d", D[:3], b"", D[3:], T, b"r", U, B, b"a", b"}", b"<|im_end|>"], ((0, 1), (5, 6), (8, 9))),
    ],
)  # fmt: skip
def test_token_rule(tokens, expected):
    spans = find_spans(tokens)
    assert spans.is_valid
    assert ranges(spans) == expected


# How the authors' code reads a completion.


def released(*tokens):
    return find_spans(tokens, rule="released")


@pytest.mark.parametrize(
    "tokens, description, reasoning",
    [
        ((b"d", D, T, b"r", U, B, b"a", b"}"), (0, 1), (3, 8)),
        ((b"d", D, b" x ", T, b"r", U, b" so ", B, b"a", b"}"), (0, 1), (4, 10)),  # text between the parts
        ((b" ", b"\n", D, T, b"r", U, B, b"a", b"}"), (0, 2), (4, 9)),  # a description of white space
        ((b"d", D, T, b"r", U, B, b"}"), (0, 1), (3, 7)),  # an empty box
        ((b"d", D, T, U, B, b"a", b"}"), (0, 1), (3, 7)),  # no reasoning: what stands behind <think> is </think>
        ((b"d", D, T, b" ", U, B, b"a", b"}"), (0, 1), (3, 8)),
        ((b"d", b".</", D[2:], T, b"r", U, B, b"a", b"}"), (0, 2), (4, 9)),  # what runs into the tag is description
        ((b"d", D[:5], D[5:], T, b"r", U, B, b"a", b"}"), (0, 1), (4, 9)),  # a tag in two tokens is none of it
        ((b"d" + D, T, b"r", U, B, b"a", b"}"), (0, 1), (2, 7)),  # even a token that holds all of the tag
        ((b"d", D, T, b"r", U, B, b"a", b"}.", b"e"), (0, 1), (3, 8)),  # the closing brace's token, not what follows
        ((b"d", D, T, b"r", U, B, b"{", b"a", b"}", b"}", b"}"), (0, 1), (3, 10)),  # the brace that balances
        ((b"d", D, T[:3], T[3:] + b"r", b"r", U + B, b"a}"), (0, 1), (4, 7)),  # tags win where the reasoning starts
        ((b"d", D + T, b"r", U, B, b"a", b"}", b"<|im_end|>"), (0, 1), (2, 7)),
        ((b"d", D, T, b"r", U, B, b"a", b"}", B, b"b", b"}"), (0, 1), (3, 8)),  # the first box
    ],
)
def test_released(tokens, description, reasoning):
    spans = released(*tokens)
    assert spans.is_valid and spans.invalid_reason is None
    assert ranges(spans) == (description, reasoning, (0, 0))


@pytest.mark.parametrize(
    "text, reason",
    [
        (b"", "no_description_close"),
        (b"d" + T + b"r" + U + B + b"a}", "no_description_close"),
        (b"d" + D + b"r" + U + B + b"a}", "no_think_open"),
        (b"d" + T + D + b"r" + U + B + b"a}", "no_think_open"),
        (b"d" + D + T + b"r" + B + b"a}", "no_think_close"),
        (b"d" + D + T + b"r" + U + b"a", "no_box"),
        (b"d" + D + T + b"r" + U + B + b"a", "unclosed_box"),
        (D + T + b"r" + U + B + b"a}", "empty_description"),
    ],
)
def test_released_invalid(text, reason):
    for tokens in ([text], [text[i : i + 1] for i in range(len(text))]):
        spans = released(*tokens)
        assert (spans.is_valid, spans.invalid_reason) == (False, reason)
        assert ranges(spans) == ((0, 0),) * 3


def test_the_rules_differ_in_the_parts_alone_where_both_hold():
    tokens = (b"d", D, T, b"r", U, B, b"a", b"}")
    assert ranges(find_spans(tokens)) == ranges(find_spans(tokens, rule="paper")) == ((0, 1), (3, 4), (6, 7))
    assert ranges(released(*tokens)) == ((0, 1), (3, 8), (0, 0))


@settings(max_examples=500)
@given(st.data())
def test_released_is_more_lenient(data):
    tokens = data.draw(tokenized())
    ours, theirs = find_spans(tokens), released(*tokens)
    assert theirs.is_valid or not ours.is_valid
    if not theirs.is_valid:
        return
    (start, end), reasoning = theirs.description, theirs.reasoning
    assert start == 0 < end <= reasoning[0] <= reasoning[1] <= len(tokens)
    text, found = b"".join(tokens), b"".join(tokens[slice(*reasoning)])
    first = text.index(T, text.index(D) + len(D)) + len(T)
    assert b"".join(tokens[:end]).startswith(text[: text.index(D)])
    # The reasoning lies behind <think>; where a token crosses its edge, the token is left out.
    rest = text[first:]
    assert rest.endswith(found + b"".join(tokens[reasoning[1] :]))
    assert U in rest and (not found or b"}" in tokens[reasoning[1] - 1])


# Often well-formed, so that many examples are valid, with a surprise thrown in now and then.
PIECES = (D, T, U, B, b"<description>", b"{", b"}", b"\\", b" ", b"\n", b"d", b"<", b">", b"\xc2\xa0")
SURPRISE = st.one_of(st.sampled_from(PIECES), st.binary(max_size=4))
GAP = st.sampled_from([b"", b" ", b"\n\n", b"\x0c"])


def joined(*parts):
    return st.tuples(*parts).map(b"".join)


def content(*inner):
    clean = st.lists(st.sampled_from([b"d", b"red", b"d ", b" ", *inner]), min_size=1, max_size=4)
    return joined(clean.map(b"".join), st.sampled_from([b"", b"", b"d"]), st.just(b"") | SURPRISE)


ANSWER = content(b"{", b"}", b"{1}")
PARTS = (content(), D, GAP, T, content(), U, GAP, B, ANSWER, b"}", content())
FRAME = joined(*(st.just(part) if isinstance(part, bytes) else part for part in PARTS))
SOUP = st.lists(SURPRISE, max_size=14).map(b"".join)


@st.composite
def tokenized(draw):
    """A completion cut at random places; equal cuts make tokens without bytes."""
    text = draw(st.one_of(FRAME, FRAME, SOUP))
    cuts = draw(st.lists(st.integers(0, len(text)), max_size=30))
    if draw(st.booleans()):  # byte by byte, as the least canonical tokens would be
        cuts = [*cuts, *range(len(text))]
    edges = [0, *sorted(cuts), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def check_against_oracle(tokens):
    spans, expected = find_spans(tokens), parse(tokens)
    assert spans.is_valid == (expected is not None) == (spans.invalid_reason is None)
    if expected is None:
        assert ranges(spans) == ((0, 0),) * 3
        return False
    edges = [edge for part in ranges(spans) for edge in part]
    assert edges == sorted(edges)  # ordered and disjoint
    assert 0 <= edges[0] and edges[-1] <= len(tokens)
    assert tuple({i for i in range(*part) if tokens[i]} for part in ranges(spans)) == expected
    return True


@pytest.mark.slow
@settings(max_examples=3000)
@given(tokenized())
@example([])
@example([b""])
def test_random_completions_agree_with_the_oracle(tokens):
    check_against_oracle(tokens)


def test_the_random_completions_are_of_both_kinds():
    seen = []

    @settings(max_examples=300, database=None)
    @given(tokenized())
    def sample(tokens):
        seen.append(check_against_oracle(tokens))

    sample()
    assert 0.15 < sum(seen) / len(seen) < 0.85


@pytest.mark.parametrize(
    "text",
    [
        b"d" + D + T + b"r" + U + B + b"{" * 400_000,
        b"d" + D + T + b"r" + U + B + b"{}" * 200_000 + b"}",
        D[:-1] * 30_000,
        b"d" + D + b" " * 400_000 + T,
        b"d" + D + T + b"r" + U + B * 60_000,
    ],
)
def test_long_completions_take_linear_time(text):
    tokens = [text[i : i + 1] for i in range(len(text))]
    start = time.perf_counter()
    find_spans(tokens)
    assert time.perf_counter() - start < 5  # about 0.1 s; a quadratic search would take minutes
