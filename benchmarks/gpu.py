"""One accelerator, random weights of 3B shapes: how far each part of a step is from what the card can do.

    python -m benchmarks.gpu [--small] [--json FILE]

`--small` takes the 100 M-parameter model and short sequences, to try the script anywhere.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import models
from vigos_jax.method.batch import SupervisedStates, TeacherStates
from vigos_jax.method.losses import ObjectiveConfig, weighted_loss
from vigos_jax.method.packing import length_groups, pack_prompts, pack_scores
from vigos_jax.models.variables import student_variables
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.rollouts.sampler import Sampler, row_keys
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.training.step import TrainState, make_train_step

ROUNDS = 5


def seconds(function: Callable[[], Any], *, rounds: int = ROUNDS) -> float:
    """Median, after one call that compiles and warms up."""
    jax.block_until_ready(function())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def calibrate(size: int) -> tuple[float, float]:
    """(FLOP/s of a bfloat16 product, bytes/s of a copy, read and written) of this device."""
    x = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    copy = jax.jit(lambda x: x + 1)
    big = jnp.ones((size * size * 4,), jnp.bfloat16)
    return 2 * size**3 / seconds(lambda: product(x)), 2 * big.nbytes / seconds(lambda: copy(big))


def random_weights(model: VisionLanguageModel) -> tuple[Any, Any]:
    """(bfloat16 base, float32 adapters), made on the device."""
    shapes = abstract_variables(model)

    def make(path, leaf, dtype):
        key = jax.random.fold_in(jax.random.key(0), hash(jax.tree_util.keystr(path)) % 2**31)
        scale = 0.02 if leaf.ndim > 1 else 1.0
        return (scale * jax.random.normal(key, leaf.shape, jnp.float32)).astype(dtype)

    base = jax.tree_util.tree_map_with_path(lambda p, x: make(p, x, jnp.bfloat16), shapes["params"])
    lora = jax.tree_util.tree_map_with_path(lambda p, x: make(p, x, jnp.float32), shapes["lora"])
    return base, {"lora": lora}


def parameters(tree: Any) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def decode(model, base, trained, rows, buckets, *, batch: int, tokens: int, bandwidth: float) -> dict[str, float]:
    """Seconds a token step takes, and what share of it reading weights and cache alone would take."""
    prompts = pack_prompts((rows * batch)[:batch], config=model.config, buckets=buckets)
    prompts = jax.tree.map(jnp.asarray, prompts)
    sampler = Sampler(model, Sampling(max_tokens=tokens, top_k=20, top_p=0.95), eos_ids=(-1,))
    variables = student_variables(base, trained)
    keys = row_keys(0, 0, batch)
    prefill = seconds(lambda: sampler.start(variables, prompts, keys), rounds=3)
    weights = sampler.weights(variables)
    whole = seconds(lambda: sampler.advance(weights, sampler.start(variables, prompts, keys), tokens), rounds=3)
    c, per_token = model.config, (whole - prefill) / tokens
    read = sum(x.nbytes for x in jax.tree.leaves((base["layers"], base["embedding"], trained)))
    read += 2 * c.num_layers * batch * (prompts.text.ids.shape[1] + tokens) * c.num_kv_heads * c.head_dim * 2
    return {"prefill_s": prefill, "per_token_s": per_token, "share_of_byte_floor": read / bandwidth / per_token}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    config, sizes = (models.MID_SIZE, models.THIRD) if args.small else (models.QWEN_3B, models.TYPICAL)
    batch, micro, batches = (2, 1, (1, 2)) if args.small else (32, 4, (2, 8, 32, 64))
    model = models.model(config, remat="full", dtype=jnp.bfloat16)
    device = jax.devices()[0]
    out: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__}

    def report(name: str, value: Any) -> None:
        out[name] = value
        print(f"{name:28} {value}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(out, indent=2) + "\n")

    peak, bandwidth = calibrate(512 if args.small else 8192)
    report("matmul_tflops", round(peak / 1e12, 2))
    report("copy_gb_per_s", round(bandwidth / 1e9, 1))
    base, trained = random_weights(model)
    report("parameters", parameters(base))
    buckets = models.exact_buckets(sizes, config)
    rows, rollouts = models.samples(config, sizes, rows=batch, invalid=batch // 8)

    for b in batches:
        measured = decode(model, base, trained, rows, buckets, batch=b, tokens=16, bandwidth=bandwidth)
        report(f"decode_B{b}", {k: round(v, 5) for k, v in measured.items()})

    # The fused divergence over one chunk after another.
    packed = pack_scores(rows, rollouts, roles=models.ROLES, config=config, buckets=buckets)
    supervised = jax.tree.map(jnp.asarray, packed.supervised)
    states = jnp.ones((*supervised.role.shape, config.hidden_size), jnp.bfloat16)
    weights = jnp.full(supervised.role.shape, 1e-3)
    objective = ObjectiveConfig(models.ROLES, chunk=32)

    @jax.jit
    @jax.grad
    def fused(student, head):
        states = SupervisedStates(student, head, {"": TeacherStates(0.5 * student, None)})
        return weighted_loss(states, supervised, weights, objective, trains_head=False)[0]

    spent = seconds(lambda: fused(states, base["embedding"]))
    work = 3 * 2 * supervised.role.size * config.hidden_size * config.vocab_size
    report("fused_kl_tflops", round(work / spent / 1e12, 2))

    # A whole step: rollout, packing, update.
    tx = optax.adamw(5e-6)
    step = make_train_step(model, tx, objective, use_dropout=False)
    state = TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained), {})
    sampling = Sampling(max_tokens=sizes.completion, top_k=20, top_p=0.95)
    sampler = Sampler(model, sampling, eos_ids=(-1,), cache_sizes=(128, 256))
    phases: dict[str, list[float]] = {"rollout": [], "pack": [], "update": []}
    for i in range(1 + ROUNDS):
        times = [time.perf_counter()]
        prompts = jax.tree.map(jnp.asarray, pack_prompts(rows, config=config, buckets=buckets))
        variables = student_variables(base, state.trained)
        images = sampler.encode(variables, prompts)
        jax.block_until_ready(sampler(variables, prompts, row_keys(0, i, batch), images).ids)
        times.append(time.perf_counter())
        micro_batches = []
        for group in length_groups(rows, rollouts, batch // micro):
            part = pack_scores(
                [rows[j] for j in group], [rollouts[j] for j in group],
                roles=models.ROLES, config=config, buckets=buckets, with_images=False,
            )  # fmt: skip
            part = jax.tree.map(jnp.asarray, part)
            micro_batches.append(part.replace(image_embeds=images[np.array(group)]))
        times.append(time.perf_counter())
        state, metrics = step(state, base, micro_batches, jax.random.key(i))
        jax.block_until_ready(metrics["loss"])
        times.append(time.perf_counter())
        for name, a, b in zip(phases, times[:-1], times[1:], strict=True):
            phases[name].append(b - a)
    medians = {name: statistics.median(x[1:]) for name, x in phases.items()}
    report("step_s", {k: round(v, 3) for k, v in (medians | {"all": sum(medians.values())}).items()})
    decoder = parameters(base["layers"])
    student = sum(int(np.sum(m.student.segment_ids > 0)) for m in micro_batches)
    teacher = sum(int(np.sum(m.teacher.segment_ids > 0)) for m in micro_batches)
    useful = 2 * decoder * (2 * student + teacher)  # forward and the pass to the states; adapters are small beside it
    report("update_mfu", round(useful / medians["update"] / peak, 3))
    memory = device.memory_stats() or {}
    report("peak_gib", round(memory.get("peak_bytes_in_use", 0) / 2**30, 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
