"""A run of mixed sizes compiles no more programs than its buckets declare."""

import json
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs as runs
from PIL import Image

from vigos_jax.training.run_log import CompileCounter

STEPS = 200
SETTINGS = {
    "mesh.data": 8, "mesh.fsdp": 1, "mesh.tensor": 1, "batch_size": 8, "checkpoint_every": STEPS,
    "data.window": 4, "gradient_accumulation_steps": 1, "sampling.max_tokens": 12,
    "buckets.patches": (64, 128), "buckets.prompt": (48, 96), "buckets.completion": (6, 16),
    "buckets.sequence": (64, 112, 384),
}  # fmt: skip


def declared_programs(buckets: Mapping[str, Sequence[int]], *, max_tokens: int) -> dict[str, int]:
    """The most programs a run can compile, by kind: one for each combination of declared sizes that it can meet.

    "other" are the update, adding up and grouping micro-batches, and what jax compiles for keys, copies and casts.
    Scoring a snapshot takes programs of its own, between the steps: at most as many as "gradient" for one micro-batch.
    """
    capacities = len([n for n in buckets["completion"] if n < max_tokens]) + 1
    images, prompts, sequences = len(buckets["patches"]), len(buckets["prompt"]), len(buckets["sequence"])
    entries = len(buckets["completion"])
    return {
        "encode": images,
        "prefill": images * prompts,
        "decode": prompts * capacities,
        "grow": prompts * (capacities - 1),
        "gradient": images * sequences**2 * entries,
        "shares": entries,
        "other": 40,
    }


@pytest.mark.stress
def test_two_hundred_steps_of_mixed_sizes(tmp_path_factory, tmp_path):
    world = runs.make_world(tmp_path_factory)
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    rows = []
    for i in range(64):
        w, h = (int(n) for n in rng.integers(56, 160, 2))
        Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
        words = "What colour is it? " * int(rng.integers(1, 4))
        rows.append({"id": str(i), "images": [f"pictures/{i}.png"], "problem": words, "answer": "red"})
    data = runs.write_rows(tmp_path / "data.jsonl", rows)
    flags = [f"--config.{k}={v}" for k, v in (SETTINGS | {"steps": STEPS, "data.source": data}).items()]
    counter = CompileCounter()
    try:
        with runs.compile_once():
            assert world.run(f"--workdir={tmp_path / 'run'}", *flags) == 0
    finally:
        counter.close()
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(found) == STEPS
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    declared = declared_programs(config["buckets"], max_tokens=config["sampling"]["max_tokens"])
    compiled = sum(row["compilations"] for row in found)
    print(f"{compiled} programs of at most {sum(declared.values())} declared: {declared}")
    assert 10 < compiled <= sum(declared.values())
    # The shapes are met early: what comes later compiles next to nothing.
    assert sum(row["compilations"] for row in found[STEPS // 2 :]) <= 0.2 * compiled
    assert counter.programs >= compiled


@pytest.mark.parametrize("keep", [0, 7, 0.5])
def test_a_torn_cache_is_compiled_again(tmp_path, keep):
    """A kill can leave half a program in the compilation cache, a full disk none of it."""
    options = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0.0}
    with runs.configured(options):
        compile_anew = lambda: jax.jit(lambda x: jnp.sin(x) * keep + 1)(jnp.arange(5.0))  # noqa: E731
        want = compile_anew()
        files = [p for p in tmp_path.rglob("*") if p.is_file()]
        assert files
        for path in files:
            data = path.read_bytes()
            path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
        with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
            np.testing.assert_array_equal(compile_anew(), want)
