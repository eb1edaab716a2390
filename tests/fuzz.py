"""Random input for fuzzing, and what must hold for it: completions as ids for the span finder, JSON for the readers."""

import functools

import numpy as np
from hypothesis import strategies as st
from oracles.spans_oracle import parse

from vigos_jax.data.processor import Processor
from vigos_jax.method.spans import find_spans

D, T, U, B = b"</description>", b"<think>", b"</think>", b"\\boxed{"
PIECES = (D, T, U, B, b"<description>", *(bytes([c]) for c in b"{}\\ \n</>d\xff"), b"red", b"\xc2\xa0")
# Not only a completion's tags: what LaTeX, data sets and models put into answers.
ANSWER_PIECES = (
    *("\\boxed{", "{", "}", "\\frac", "\\text{", "$", "$$", "^", "_", "\\sqrt", "**", "(", ")", "[", "]", ",", "."),
    *("A", "b", "(C)", "D.", "yes", "No", "0", "7", "12", "1,000", "-", "−", "+", "/", "e9", "%", "°", " cm", " m"),
    *("{,}", '"', "'", "`", "“", "\\(", "\\)", "\\,", " ", "\n", "\x00", "\u0663", "\u212a", "ß", "\ud800", "=", ";"),
)


def random_text(rng: np.random.Generator) -> bytes:
    """The bytes of a completion: more or less well-formed, or soup."""

    def soup(most: int) -> bytes:
        return b"".join(PIECES[i] for i in rng.integers(len(PIECES), size=rng.integers(most + 1)))

    if rng.random() < 0.25:
        return soup(16)
    gap = lambda: (b"", b" ", b"\n\n")[rng.integers(3)]  # noqa: E731
    word = lambda: (b" a red cat", b"d", b"{1}", b" ")[rng.integers(4)]  # noqa: E731
    parts = [word(), D, gap(), T, word(), U, gap(), B, word(), b"}", gap()]
    for i in range(len(parts)):
        chance = rng.random()
        if chance < 0.04:
            parts[i] = b""
        elif chance < 0.08:
            parts[i] += soup(3)
        elif chance < 0.1:
            parts[i] = parts[i][: rng.integers(len(parts[i]) + 1)]
    return b"".join(parts)


@functools.cache
def _ids_of(processor: Processor) -> dict[bytes, list[int]]:
    """Ids by their bytes, some of which several tokens share."""
    out: dict[bytes, list[int]] = {}
    for i in range(len(processor.tokenizer)):
        out.setdefault(processor.token_bytes([i])[0], []).append(i)
    return out


def random_ids(rng: np.random.Generator, processor: Processor) -> list[int]:
    """A completion as a model could sample it: not the tokenizer's own cuts, with ends and strangers in between."""
    text, ids, known = random_text(rng), [], _ids_of(processor)
    most = (1, 3, 12)[rng.integers(3)]
    while text:
        lengths = [n for n in range(1, min(most, len(text)) + 1) if text[:n] in known]
        n = lengths[rng.integers(len(lengths))]
        ids.append(known[text[:n]][0])
        text = text[n:]
    size = len(processor.tokenizer)
    for _ in range(rng.integers(3) if rng.random() < 0.4 else 0):
        stranger = int(rng.integers(size + 8)) if rng.random() < 0.7 else processor.eos_ids[0]  # some have no bytes
        ids.insert(int(rng.integers(len(ids) + 1)), stranger)
    return ids + [processor.eos_ids[0]] * int(rng.random() < 0.7)


def random_cuts(rng: np.random.Generator) -> list[bytes]:
    """A completion cut anywhere: no vocabulary has such tokens, but a token may hold the end of one tag and another."""
    text = random_text(rng)
    edges = [0, *sorted(rng.integers(0, len(text) + 1, size=rng.integers(9)).tolist()), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def check_spans(tokens: list[bytes]) -> bool:
    """Asserts what must hold of any completion, by either rule; returns whether it is valid."""
    spans, released, expected = find_spans(tokens), find_spans(tokens, rule="released"), parse(tokens)
    for found in (spans, released):
        edges = [edge for part in (found.description, found.reasoning, found.answer) for edge in part]
        if not found.is_valid:
            assert edges == [0] * 6 and found.invalid_reason
        used = edges if found is spans else edges[:4]  # by the released rule the answer is part of the reasoning
        assert used == sorted(used) and 0 <= used[0] and used[-1] <= len(tokens)  # in range, ordered, disjoint
    assert released.is_valid or not spans.is_valid
    assert spans.is_valid == (expected is not None) == (spans.invalid_reason is None)
    if expected is not None:
        parts = (spans.description, spans.reasoning, spans.answer)
        assert tuple({i for i in range(*part) if tokens[i]} for part in parts) == expected
    return spans.is_valid


def fuzz_spans(processor: Processor, count: int, *, seed: int = 0) -> dict[str, int]:
    """Checks `count` random completions; returns how many were valid, and how many there were."""
    rng, valid = np.random.default_rng(seed), 0
    for i in range(count):
        valid += check_spans(random_cuts(rng) if i % 4 == 0 else processor.token_bytes(random_ids(rng, processor)))
    return {"completions": count, "valid": valid}


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.sampled_from([2**31, 2**63, 10**400, -(10**400), 0.0, -1.5, 1e308, float("nan"), float("inf"), float("-inf")]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "~nobody-here/x", "frozen", "tokens", "{reference}", "demo", "(", "a/b", "\ud800", "valid"]),
)
KEYS = st.sampled_from(["user", "frames", "fps", "path", "bytes", "scores", "weight"]) | st.text("abc_", max_size=3)
JSON = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=4) | st.dictionaries(KEYS, x, max_size=4), max_leaves=8
)  # fmt: skip
ANSWERS = st.lists(st.sampled_from(ANSWER_PIECES), max_size=14).map("".join) | st.text(max_size=30)
