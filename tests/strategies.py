"""Random batches for property tests."""

import tiny
from hypothesis import strategies as st

SIZES = [(2, 2), (4, 4), (2, 6), (4, 2)]


@st.composite
def mixes(draw, *, min_rows: int, max_rows: int):
    """(row, rollout) pairs: valid with random parts (empty ones too), invalid, bad; of up to two pictures."""
    mix = []
    for seed in range(draw(st.integers(min_rows, max_rows))):
        sizes = draw(st.lists(st.sampled_from(SIZES), max_size=2))
        kind = draw(st.sampled_from(["valid", "invalid", "bad"]))
        if kind == "valid":
            cuts = sorted(draw(st.lists(st.integers(0, 16), min_size=6, max_size=6)))
            n = draw(st.integers(cuts[-1], 16))
            mix.append((tiny.row(seed, *sizes), tiny.valid(seed, n, *zip(cuts[::2], cuts[1::2], strict=True))))
        else:
            n = draw(st.integers(0, 16))
            mix.append((tiny.row(seed, *sizes), tiny.invalid(seed, n)) if kind == "invalid" else tiny.BAD)
    return mix
