"""Rows grouped by size: the same batches for everyone, every row once, less padding; and sizes without decoding."""

import io

import jax
import numpy as np
import pytest
from helpers import make_processor_folder
from PIL import Image

from vigos_jax import session
from vigos_jax.data.examples import Encoder, row_size
from vigos_jax.data.images import BadImage, image_size
from vigos_jax.data.loader import Order, _Batches, make_batches
from vigos_jax.data.processor import Processor
from vigos_jax.training.run_log import CompileCounter

SIZES = np.random.default_rng(0).integers(50, 2000, 96)


def batches(window, *, seed=0, sizes=SIZES, batch_size=8):
    order = np.random.default_rng(1).permutation(len(sizes))
    found = _Batches(order, Order(batch_size, seed, window=window), size_of=lambda i: sizes[i])
    return [list(found[i]) for i in range(len(found))], list(order)


def waste(batches):
    return sum(len(b) * SIZES[b].max() - SIZES[b].sum() for b in batches)


@pytest.mark.parametrize("window", [2, 4, 12])
def test_a_window_holds_the_rows_it_held_before(window):
    grouped, order = batches(window)
    for first in range(0, len(grouped), window):
        rows = order[first * 8 : (first + window) * 8]
        assert sorted(sum(grouped[first : first + window], [])) == sorted(rows)
    assert waste(grouped) < waste(batches(1)[0]) / 1.5
    assert grouped == batches(window)[0] != batches(window, seed=1)[0]


def test_without_a_window_the_order_is_kept():
    found, order = batches(1)
    assert sum(found, []) == order


def test_sizes_do_not_rise_through_a_window():
    found, _ = batches(12)
    means = [SIZES[b].mean() for b in found]
    assert means != sorted(means)


def test_any_batch_can_be_asked_for_first():
    order = np.random.default_rng(1).permutation(96)
    one, other = (_Batches(order, Order(8, 0, window=4), size_of=lambda i: SIZES[i]) for _ in range(2))
    forward = [list(one[i]) for i in range(12)]
    assert [list(other[i]) for i in reversed(range(12))] == forward[::-1]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor.load(make_processor_folder(tmp_path_factory.mktemp("model")))


class Rows:
    """Pictures of many sizes; `decoded` counts how often a row was asked for."""

    image_roots = ()

    def __len__(self):
        return 24

    def __getitem__(self, i):
        picture = Image.new("RGB", (30 + 4 * (i % 12), 40))
        return {"id": str(i), "problem": "What?" * (1 + i % 3), "answer": "red", "images": [picture]}


def test_processes_and_workers_see_the_same_grouped_batches(processor):
    encoder = Encoder(processor, max_images=1)

    def ids(n, *, window=3, **more):
        iterator = make_batches(Rows(), encoder, Order(4, 0, window=window), **more)
        return [[e.id for e in next(iterator)] for _ in range(n)]

    whole = ids(6)
    assert sorted(sum(whole, [])) == sorted(str(i) for i in range(24))
    halves = [ids(6, rows=[2 * p, 2 * p + 1]) for p in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert ids(2, start_batch=4) == whole[4:]
    assert whole != ids(6, window=1)


@pytest.mark.parametrize("size", [(28, 28), (84, 40), (200, 31), (31, 200), (64, 64)])
def test_visual_tokens_are_those_of_the_encoded_picture(processor, size):
    encoded = processor.encode_image(Image.new("RGB", size))
    assert processor.visual_tokens(*size) == len(encoded.patches) // 4


def test_image_size_turns_as_reading_does():
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 50)).save(file, "JPEG", exif=exif)
    assert image_size(file.getvalue(), image_roots=()) == (50, 30)
    assert image_size(Image.new("L", (3, 5)), image_roots=()) == (3, 5)
    for bad in (b"", b"no picture", None, 3):
        with pytest.raises(BadImage):
            image_size(bad, image_roots=())


def test_row_size(processor):
    picture = Image.new("RGB", (84, 84))
    size = lambda **row: row_size(row, processor=processor, image_roots=())  # noqa: E731
    tokens = processor.visual_tokens(84, 84)
    assert size(images=[picture], problem="x" * 40) == tokens + 10
    assert size(images=[picture, picture], problem=None) == 2 * tokens
    assert size(images=[b"broken"], problem="x" * 8) == 2 and size() == 0


def test_the_counter_counts_programs():
    counter = CompileCounter()
    f = jax.jit(lambda x: x * 3 + 1)
    x = np.ones(5, np.float32)
    f(x)
    once = counter.programs
    f(x)
    assert once >= 1 and counter.programs == once and counter.seconds > 0
    f(np.ones(6, np.float32))
    assert counter.programs > once
    last = counter.programs
    counter.close()
    f(np.ones(7, np.float32))
    assert counter.programs == last


def test_the_compilation_cache_is_where_it_is_asked_for(tmp_path, monkeypatch):
    set_to = {}
    monkeypatch.setattr(session.jax.config, "update", set_to.__setitem__)
    monkeypatch.setattr(type(session.jax.config), "jax_compilation_cache_dir", None, raising=False)
    session.use_compilation_cache("")
    assert set_to == {}
    session.use_compilation_cache(str(tmp_path))
    assert set_to["jax_compilation_cache_dir"] == str(tmp_path)
    set_to.clear()
    monkeypatch.setattr(type(session.jax.config), "jax_compilation_cache_dir", "/elsewhere", raising=False)
    session.use_compilation_cache(str(tmp_path))
    assert set_to == {}
