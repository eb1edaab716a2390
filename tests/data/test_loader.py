"""Bad rows that keep their slot, batches that depend on the seed alone."""

import dataclasses
import itertools
import json
import time

import numpy as np
import pytest
from tiny_rows import GOOD, config, encode, picture, picture_bytes, rows, small_rows, write_parquet

from vigos_jax.data import loader as data_lib
from vigos_jax.data.bad_rows import BadRows
from vigos_jax.data.examples import Encoder
from vigos_jax.data.loader import Order, make_batches
from vigos_jax.data.sources import load_source
from vigos_jax.errors import InputError

# --- bad rows ---


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"answer": 0}, None),
        ({"answer": 0.5}, None),
        ({"images": picture()}, None),
        ({"images": {"bytes": picture_bytes(), "path": "gone.png"}}, None),
        ({"problem": ""}, "empty_problem"),
        ({"problem": " <image>\n"}, "empty_problem"),
        ({"problem": None}, "empty_problem"),
        ({"problem": ["Q?"]}, "bad_problem_type"),
        ({"answer": ""}, "empty_answer"),
        ({"answer": None}, "empty_answer"),
        ({"answer": float("nan")}, "empty_answer"),
        ({"answer": [["a"]]}, "bad_answer_type"),
        ({"answer": "\ud800"}, "text_not_unicode"),
        ({"images": None}, "no_image"),
        ({"images": []}, "no_image"),
        ({"images": [None]}, "no_image"),
        ({"images": [picture_bytes()] * 2}, "too_many_images"),
        ({"images": [b"no picture"]}, "image_unreadable"),
        ({"images": [3]}, "bad_image_type"),
        ({"images": [{"bytes": None, "path": None}]}, "image_missing"),
        ({"images": ["a.png"]}, "image_outside_folder"),
        ({"images": [picture_bytes(size=(27, 500))]}, "image_too_small"),
        ({"images": [picture_bytes(size=(28, 5601))]}, "image_too_narrow"),
    ],
)
def test_bad_row(processor, change, reason):
    example = encode(GOOD | change, processor)
    assert (example.id, example.bad_reason) == ("r", reason)
    if reason is None:
        assert len(example.images) == 1 and example.problem == "Q?" and example.reference
    else:
        assert (example.images, example.problem, example.reference) == ((), "", "")


def test_row_number_is_the_last_resort(processor):
    assert encode(GOOD | {"id": None}, processor).id == "7"
    assert encode(GOOD | {"id": 0}, processor).id == "0"
    assert encode(GOOD | {"problem_id": 5}, processor).id == "5"


def test_several_images(processor):
    images = [picture_bytes(1), picture(2, size=(60, 30))]
    example = encode(GOOD | {"images": images}, processor, max_images=2)
    for encoded, image in zip(example.images, (picture(1), images[1]), strict=True):
        np.testing.assert_array_equal(encoded.patches, processor.encode_image(image).patches)


def test_too_long(processor):
    def too_long(example):
        assert example.problem == "Q?" and len(example.images) == 1
        return "prompt_too_long" if example.reference == "a" else None

    assert encode(GOOD, processor, too_long=too_long).bad_reason == "prompt_too_long"
    assert encode(GOOD | {"answer": "b"}, processor, too_long=too_long).bad_reason is None


# --- further columns ---


@pytest.mark.parametrize("value", [None, "", " \n", float("nan"), 3, ["red"], {"a": "red"}, b"red"])
def test_a_row_without_a_text_in_a_further_column_is_bad(processor, value):
    row = GOOD | {"hint": "h", "caption": value}
    example = encode(row, processor, fields=("hint", "caption"))
    assert (example.id, example.bad_reason, example.fields) == ("r", "no_caption", {})
    del row["caption"]
    assert encode(row, processor, fields=("caption",)).bad_reason == "no_caption"
    assert encode(row, processor, fields=("hint",)).fields == {"hint": "h"}


def test_half_a_surrogate_pair_in_a_further_column(processor):
    assert encode(GOOD | {"caption": "\ud800"}, processor, fields=("caption",)).bad_reason == "text_not_unicode"


def test_further_columns_reach_the_batches(processor):
    table = [row | {"caption": f"c{i}"} for i, row in enumerate(small_rows(5))]
    del table[3]["caption"]
    seen = {e.id: e for b in batches(table, processor, 1, batch_size=5, fields=("caption",)) for e in b}
    assert {i: dict(e.fields) for i, e in seen.items() if not e.bad_reason} == {
        f"row{i}": {"caption": f"c{i}"} for i in (0, 1, 2, 4)
    }
    assert seen["row3"].bad_reason == "no_caption"


# --- batches ---


def batches(source, processor, n, *, batch_size=4, **options):
    fields = {f.name for f in dataclasses.fields(Encoder)}
    encoder = Encoder(processor, **{"max_images": 1} | {k: v for k, v in options.items() if k in fields})
    order = Order(batch_size, **{"seed": 5} | {k: options[k] for k in ("seed", "shuffle", "window") if k in options})
    rest = {k: options[k] for k in ("workers", "rows", "start_batch") if k in options}
    iterator = make_batches(source, encoder, order, **rest)
    try:
        return list(itertools.islice(iterator, n))
    finally:
        iterator.close()


def ids(batches):
    return [[example.id for example in batch] for batch in batches]


def flat(batches):
    return list(itertools.chain.from_iterable(ids(batches)))


def test_epochs(processor):
    order = flat(batches(small_rows(10), processor, 15))  # 60 rows, six epochs
    epochs = [order[i : i + 10] for i in range(0, 60, 10)]
    for epoch in epochs:  # nothing is dropped where a batch reaches over the end
        assert sorted(epoch) == sorted(f"row{i}" for i in range(10))
    assert len(set(map(tuple, epochs))) == 6
    assert order == flat(batches(small_rows(10), processor, 15))
    assert order != flat(batches(small_rows(10), processor, 15, seed=6))
    unshuffled = flat(batches(small_rows(10), processor, 5, shuffle=False))
    assert unshuffled == [f"row{i % 10}" for i in range(20)]


def test_source_smaller_than_a_batch(processor):
    assert [sorted(b) for b in ids(batches(small_rows(1), processor, 2))] == [["row0"] * 4] * 2
    assert sorted(flat(batches(small_rows(3), processor, 3))) == sorted(["row0", "row1", "row2"] * 4)


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_batch(processor, process_count):
    source = small_rows(10)
    whole = ids(batches(source, processor, 6))
    parts = [
        ids(batches(source, processor, 6, rows=range(p, 4, process_count)))  # whichever its devices hold
        for p in range(process_count)
    ]
    assert all(len(batch) == 4 // process_count for part in parts for batch in part)
    for p, part in enumerate(parts):
        assert part == [batch[p::process_count] for batch in whole]


def test_resume(processor):
    source = small_rows(10)
    whole = ids(batches(source, processor, 9))
    assert ids(batches(source, processor, 4, start_batch=5)) == whole[5:]
    assert ids(batches(source, processor, 1, start_batch=10**12))  # as far as one likes


def drop_row4(example):
    return "prompt_too_long" if example.id == "row4" else None


@pytest.mark.slow
def test_worker_processes_change_nothing(tmp_path, processor):
    table = [row | {"id": f"row{i}"} for i, row in enumerate(rows(9))]
    table[2]["images"] = [b"broken"]
    source = load_source(config(write_parquet(tmp_path / "a.parquet", table)))
    options = {"too_long": drop_row4, "start_batch": 1}
    alone = batches(source, processor, 5, workers=0, **options)
    helped = batches(source, processor, 5, workers=2, **options)
    assert [len(batch) for batch in helped] == [4] * 5
    reasons = {e.id: e.bad_reason for batch in helped for e in batch}
    assert len(reasons) == 9
    assert {i: r for i, r in reasons.items() if r} == {"row2": "image_unreadable", "row4": "prompt_too_long"}
    for a, b in zip(itertools.chain(*alone), itertools.chain(*helped), strict=True):
        assert (a.id, a.problem, a.reference, a.bad_reason) == (b.id, b.problem, b.reference, b.bad_reason)
        assert [image.grid for image in a.images] == [image.grid for image in b.images]
        for image_a, image_b in zip(a.images, b.images, strict=True):
            np.testing.assert_array_equal(image_a.patches, image_b.patches)


class SlowSource(list):
    """Counts how far it was read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def test_little_is_read_ahead(processor):
    source = SlowSource(small_rows(10))
    iterator = make_batches(source, Encoder(processor, max_images=1), Order(2, seed=0))
    next(iterator)
    time.sleep(0.3)
    assert source.reads <= 2 * 4  # two batches ahead of the one given out
    iterator.close()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32}, "seed 4294967296"),
        ({"workers": -1}, "data.workers -1"),
        ({"max_images": 0}, "data.max_images 0"),
    ],
)
def test_batch_options(processor, options, message):
    with pytest.raises(InputError, match=message):
        batches(small_rows(2), processor, 1, **options)
    with pytest.raises(InputError, match="has 0 rows"):
        batches([], processor, 1)


# --- state ---


def test_resume_batch():
    def state(n=20, **changes):
        values = {"batch_size": 4, "seed": 1, "next_batch": 0} | changes
        next_batch = values.pop("next_batch")
        return data_lib.data_state(small_rows(n), Order(**values), next_batch=next_batch)

    saved = json.loads(json.dumps(state(next_batch=6)))
    assert data_lib.resume_batch(saved, state()) == 6
    for changed in (state(batch_size=8), state(seed=2), state(shuffle=False), state(n=21)):
        with pytest.raises(InputError, match="was .* and is"):
            data_lib.resume_batch(saved, changed)


def test_bad_rows_are_counted():
    counts = BadRows()
    counts.update(8, {"no_image": 1})
    counts.update(2, {"empty_answer": 1, "no_image": 1})
    assert counts.summary() == "3 of 10 rows bad: no_image 2, empty_answer 1"
    assert (counts.rows, counts.bad) == (10, 3)
    assert BadRows().summary() == "0 of 0 rows bad"
    BadRows().check(0.0)


@pytest.mark.parametrize(
    "bad, good, fraction, stops",
    [
        (1, 3, 0.1, False),  # 1 of 100 at the least
        (10, 3, 0.1, False),
        (11, 3, 0.1, True),
        (99, 901, 0.1, False),
        (101, 899, 0.1, True),
        (1, 500, 0.0, True),
        (7, 0, 1.0, False),
        (8, 0, 1.0, True),  # none at all to learn from
        (8, 1, 1.0, False),
    ],
)
def test_too_many_bad_rows(bad, good, fraction, stops):
    counts = BadRows()
    counts.update(bad + good, {"no_image": bad})
    if stops:
        with pytest.raises(InputError, match=f"{bad} of {bad + good} rows bad: no_image {bad}"):
            counts.check(fraction)
    else:
        counts.check(fraction)
