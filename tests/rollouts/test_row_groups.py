"""Groups of rows: which rows are in one, that they come back to their places, and that rollouts do not change."""

import dataclasses
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampler import NEVER, ROWS, SAMPLING, prompts, rollouts, student
from tiny import CONFIG, MODEL

from vigos_jax.rollouts.row_groups import group_count, put_rows, room_for, rows_for_memory, take_rows
from vigos_jax.rollouts.sampler import Completions, Sampler, interleave, row_keys
from vigos_jax.runtime.sharding import batch_sharding, make_mesh

MESH = make_mesh(data=2, fsdp=2, tensor=1, devices=jax.devices()[:4])


def batch(rows=16):
    return {
        "x": jnp.arange(rows * 3).reshape(rows, 3),
        "keys": row_keys(0, 0, rows),
        "flag": jnp.arange(rows) % 3 == 0,
        "none": None,
    }


def plain(rows, shards, groups):
    """Row numbers of each group: of every shard the next rows."""
    each = rows // shards // groups
    return [[s * rows // shards + g * each + i for s in range(shards) for i in range(each)] for g in range(groups)]


@pytest.mark.parametrize("mesh, shards", [(None, 1), (MESH, 4)])
def test_groups_are_taken_and_put_back(mesh, shards):
    whole, groups = batch(), 2
    if mesh is not None:
        whole = jax.device_put(whole, batch_sharding(mesh))
    parts = [take_rows(whole, jnp.int32(g), groups=groups, mesh=mesh) for g in range(groups)]
    for part, rows in zip(parts, plain(16, shards, groups), strict=True):
        np.testing.assert_array_equal(part["x"], np.asarray(whole["x"])[rows])
        np.testing.assert_array_equal(part["flag"], np.asarray(whole["flag"])[rows])
    back = room_for({**parts[0], "step": jnp.int32(0)}, groups=groups, mesh=mesh)
    for g in (1, 0):
        back = put_rows(back, {**parts[g], "step": jnp.int32(7)}, jnp.int32(g), groups=groups, mesh=mesh)
    assert back.pop("step") == 7
    for name in ("x", "flag"):
        np.testing.assert_array_equal(back[name], whole[name])
    assert (jax.random.key_data(back["keys"]) == jax.random.key_data(whole["keys"])).all()
    if mesh is not None:
        assert back["x"].sharding.is_equivalent_to(batch_sharding(mesh), 2)


@pytest.mark.parametrize(
    "rows, most, mesh, groups",
    [(8, 0, None, 1), (8, 8, None, 1), (8, 7, None, 2), (8, 3, None, 4), (8, 1, None, 8), (6, 4, None, 2),
     (16, 8, MESH, 2), (16, 4, MESH, 4), (16, 1, MESH, 4), (16, 5, MESH, 4), (4, 1, MESH, 1)],
)  # fmt: skip
def test_as_few_groups_as_the_limit_allows(rows, most, mesh, groups):
    assert group_count(rows, most, mesh=mesh) == groups


def test_memory_bounds_a_group():
    sizes = {"prompt": 64, "patches": 64, "itemsize": 2}
    few, many = (rows_for_memory(CONFIG, memory=m, **sizes) for m in (1e7, 1e9))
    assert 1 <= few < many and many == pytest.approx(100 * few, rel=0.5)
    assert rows_for_memory(CONFIG, memory=1.0, **sizes) == 1
    assert rows_for_memory(CONFIG, memory=1e9, **{**sizes, "prompt": 128, "patches": 128}) < many


def test_completions_of_groups_stand_in_the_rows_order():
    make = lambda rows: Completions(tuple((r,) for r in rows), tuple((-float(r),) for r in rows))  # noqa: E731
    first, second = plain(8, 2, 2)
    out = interleave([make(first), make(second)], groups=2, parts=2)
    assert out.ids == tuple((r,) for r in range(8)) and out.logps == tuple((-float(r),) for r in range(8))
    half = interleave([make(first)], groups=2, parts=2)
    assert half.ids == tuple((r,) if r in first else () for r in range(8))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"micro_batch": 3}, {"decode_batch": 4}, {"decode_batch": 4, "micro_batch": 1}])
def test_groups_change_no_rollout(sizes):
    """Also the visual tokens, which training reads."""
    sampler = Sampler(MODEL, dataclasses.replace(SAMPLING, **sizes), eos_ids=NEVER)
    groups = sampler.micro_groups(prompts())
    assert groups == {3: 4, 1: 8}.get(sizes.get("micro_batch", 0), 1)
    keys = row_keys(0, 0, len(ROWS))
    images = sampler.encode(student(), prompts())
    out = sampler(student(), prompts(), keys, images)
    assert out.ids == rollouts().ids
    for a, b in zip(out.logps, rollouts().logps, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    whole = Sampler(MODEL, SAMPLING, eos_ids=NEVER).encode(student(), prompts())
    np.testing.assert_allclose(images, whole, atol=1e-5)
    if "decode_batch" in sizes:
        pieces = list(sampler.stream(student(), prompts(), keys, every=5))
        assert len(pieces) == 8 and pieces[-1].ids == out.ids
        assert pieces[0].ids == tuple(ids[:5] if i < 4 else () for i, ids in enumerate(out.ids))


def test_a_device_without_much_memory_takes_fewer_rows():
    assert Sampler(MODEL, SAMPLING, eos_ids=NEVER, memory=1e4).micro_groups(prompts()) == 8
    assert Sampler(MODEL, SAMPLING, eos_ids=NEVER, memory=1e12).micro_groups(prompts()) == 1
    assert Sampler(MODEL, SAMPLING, eos_ids=NEVER).micro_groups(prompts()) == 1
    large = dataclasses.replace(SAMPLING, micro_batch=4)
    assert Sampler(MODEL, large, eos_ids=NEVER, memory=1e4).micro_groups(prompts()) == 2


def test_prompts_do_not_run_beside_the_copied_layers(monkeypatch):
    """On an H200 both together were the peak of a 3B step, 4.5 GB above the plan, which has one after the other."""
    sampler = Sampler(MODEL, dataclasses.replace(SAMPLING, max_tokens=2, decode_batch=4), eos_ids=NEVER)
    copies, alive_at_start = [], []
    start, weights = sampler.start, sampler.weights

    def copied(*args):
        out = weights(*args)
        copies.extend(weakref.ref(x) for x in jax.tree.leaves(out.layers))
        return out

    def started(*args):
        alive_at_start.append(sum(copy() is not None for copy in copies))
        return start(*args)

    monkeypatch.setattr(sampler, "weights", copied)
    monkeypatch.setattr(sampler, "start", started)
    sampler(student(), prompts(), row_keys(0, 0, len(ROWS)))
    assert alive_at_start == [0, 0] and copies
