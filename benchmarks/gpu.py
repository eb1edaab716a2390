"""One accelerator, random weights of 3B shapes in bfloat16: each part of a step against what the device can do.

    python -m benchmarks.gpu [--only PART ...] [--small] [--json FILE]

Before attention is timed, what the device computes is compared with float32. `--small` takes the 100 M-parameter model
and short sequences, to try the script anywhere. Exits 1 where attention is wrong.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import models
from benchmarks.harness import Result, copy_rate, product_rate, race
from vigos_jax.method.batch import SupervisedStates, TeacherStates
from vigos_jax.method.losses import ObjectiveConfig, weighted_loss
from vigos_jax.method.packing import length_groups, pack_prompts, pack_scores
from vigos_jax.models.attention import attention
from vigos_jax.models.attention_masks import Branches, Causal, Described, Images, Windows
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.variables import student_variables
from vigos_jax.rollouts.sampler import Sampler, row_keys
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.training.step import TrainState, make_train_step

ROUNDS = 5
SAMPLED = {"top_k": 20, "top_p": 0.95}
# Relative to the length of the float32 gradient or output; other masks are wrong by far more.
TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured, and the rates of the device.

    Attributes:
      batch, micro_batches: rows of a step, and in how many pieces they are scored.
      decode_batches: batches that are decoded.
      product, copy: FLOP/s of a plain bfloat16 product, bytes/s of a copy, read and written.
    """

    config: ModelConfig
    sizes: models.Sizes
    batch: int
    micro_batches: int
    decode_batches: tuple[int, ...]
    product: float
    copy: float

    @functools.cached_property
    def model(self):
        return models.model(self.config, remat="full", dtype=jnp.bfloat16)

    @functools.cached_property
    def weights(self) -> tuple[Any, Any]:
        """(base, trained)."""
        variables = models.weights_on_device(self.config)
        return variables["params"], {"lora": variables["lora"]}

    @functools.cached_property
    def samples(self):
        """(rows, rollouts); of eight rollouts one is invalid."""
        return models.samples(self.config, self.sizes, rows=self.batch, invalid=self.batch // 8)

    @property
    def buckets(self):
        return models.exact_buckets(self.config)


def make_job(*, small: bool) -> Job:
    """The work, and the rates of this device, which it measures."""
    size = 512 if small else 8192
    product, copy = product_rate(size, jnp.bfloat16), copy_rate(8 * size**2)
    if small:
        return Job(models.MID_SIZE, models.THIRD, 2, 2, (1, 2), product, copy)
    return Job(models.QWEN_3B, models.TYPICAL, 32, 8, (2, 8, 32, 64), product, copy)


def seconds(function: Callable[[], Any], *, rounds: int = ROUNDS) -> float:
    """Median, after one call that compiles and warms up."""
    jax.block_until_ready(function())
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def parameters(tree: Any) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


# Attention.


def masks(job: Job) -> dict[str, tuple[Described, Described, np.ndarray, tuple[int, int, int]]]:
    """name -> (mask, another mask, used slots [B, T], (query heads, key/value heads, head width)).

    The last row of each is half as long.
    """
    c, v, sizes, rows = job.config, job.config.vision, job.sizes, job.batch // job.micro_batches
    h, w = sizes.grid
    patches = -(-h * w // v.window_patches) * v.window_patches
    # As `models.samples` has them: a header of six; perception's turn of ten; a branch does not run its last token.
    prefix = h * w // v.merge_unit + 6
    branches = (10 + sizes.description - 1, sizes.privileged + sizes.completion - 1)
    student, teacher = prefix + sizes.prompt + sizes.completion, prefix + sum(branches)
    lengths = lambda n: np.where(np.arange(rows) == rows - 1, n // 2, n).astype(np.int32)  # noqa: E731
    used = lambda n, slots: np.arange(slots) < lengths(n)[:, None]  # noqa: E731
    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate((prefix, *branches))])
    segments = np.where(used(teacher, teacher), segments, 0).astype(np.int32)
    two = np.where(np.arange(patches) < h * w // 3, 1, 2) * used(h * w, patches)  # two images in a row
    two = two.astype(np.int32)
    decoder, tower = (c.num_heads, c.num_kv_heads, c.head_dim), (v.num_heads, v.num_heads, v.hidden_size // v.num_heads)
    return {
        "causal": (Causal(lengths(student)), Causal(lengths(student) // 2), used(student, student), decoder),
        "branches": (
            Branches(segments, most=2, has_gaps=False),
            Branches(np.minimum(segments, 2), most=2, has_gaps=False),
            segments > 0,
            decoder,
        ),
        "images": (Images(two, most=2), Images(np.minimum(two, 1), most=2), two > 0, tower),
        "windows": (
            Windows(two, most=2, window=v.window_patches),
            Windows(two, most=2, window=v.window_patches // 2),
            two > 0,
            tower,
        ),
    }


def attention_of(job: Job, name: str) -> Result:
    """The device's fused kernel against XLA's attention, forward and backward; both are compared with float32."""
    *arrays, (n, k, h) = masks(job)[name]
    mask, other, used = jax.device_put(tuple(arrays))
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(*used.shape, heads, h) for heads in (n, k, k, n)]
    *qkv, d_out = (jax.random.normal(key, x, jnp.bfloat16) for key, x in zip(keys, shapes, strict=True))
    d_out = d_out * used[:, :, None, None]

    @functools.partial(jax.jit, static_argnums=0)
    def both_passes(kernel, mask, qkv, d_out):
        out, pull = jax.vjp(lambda *x: attention(*x, mask, implementation=kernel), *qkv)
        return out * used[:, :, None, None], *pull(d_out.astype(out.dtype))

    with jax.default_matmul_precision("highest"):
        wanted = both_passes("xla", mask, [x.astype(jnp.float32) for x in qkv], d_out)

    def error(got) -> float:
        """The largest of output and three gradients."""
        norm = lambda x: float(jnp.linalg.norm(x.astype(jnp.float32)))  # noqa: E731
        return max(norm(a - b) / norm(b) for a, b in zip(got, wanted, strict=True))

    ours = job.model.attention
    fused, plain, wrong = (
        error(both_passes(kernel, m, qkv, d_out)) for kernel, m in ((ours, mask), ("xla", mask), (ours, other))
    )
    is_right = fused < TOLERANCE < wrong  # NaN never is
    runs = (functools.partial(both_passes, kernel, mask, qkv, d_out) for kernel in ("xla", ours))
    r = race(*runs, rounds=20, warm_up=3)
    detail = (
        ("XLA", f"{1e3 * r.baseline:.2f} ms, error {plain:.1e}"),
        (ours, f"{1e3 * r.ours:.2f} ms, error {fused:.1e} against float32; with another mask {wrong:.2f}"),
        ("sizes", f"{used.shape[0]} rows of {used.shape[1]}, {n} heads of {h}, {k} for keys"),
    )
    what = f"attention, {name}, forward and backward"
    return Result(f"attention_{name}", what, r.ratio, None, r.spread, detail, is_right)


# The other parts.


def decode(job: Job, batch: int) -> Result:
    """A decoded token's time, against that of reading weights and cache once."""
    tokens, (base, trained), config = 64, job.weights, job.config
    prompts = jax.tree.map(
        jnp.asarray, pack_prompts((job.samples[0] * batch)[:batch], config=config, buckets=job.buckets)
    )
    sampler = Sampler(job.model, Sampling(max_tokens=tokens, **SAMPLED), eos_ids=(-1,))
    variables, keys = student_variables(base, trained), row_keys(0, 0, batch)
    images = sampler.encode(variables, prompts)
    encode = seconds(lambda: sampler.encode(variables, prompts), rounds=3)
    prefill = seconds(lambda: sampler.start(variables, prompts, keys, images), rounds=3)
    weights = sampler.weights(variables)
    whole = seconds(lambda: sampler.advance(weights, sampler.start(variables, prompts, keys, images), tokens), rounds=3)
    each = (whole - prefill) / tokens
    slots = prompts.text.ids.shape[1] + tokens
    read = sum(x.nbytes for x in jax.tree.leaves((base["layers"], base["embedding"])))
    read += 2 * parameters(trained)  # read in the dtype of the products
    read += 2 * config.num_layers * batch * slots * config.num_kv_heads * config.head_dim * 2
    floor = read / job.copy
    detail = (
        ("a token", f"{1e3 * each:.2f} ms, {batch / each:,.0f} tokens a second"),
        ("floor", f"{1e3 * floor:.2f} ms: {read / 1e9:.1f} GB at the rate of a copy"),
        ("before the first", f"images {encode:.3f} s, prompts of {prompts.text.ids.shape[1]} slots {prefill:.3f} s"),
    )
    what = f"a decoded token, floor / time, B = {batch}"
    return Result(f"decode_{batch}", what, floor / each, None, None, detail)


def divergence(job: Job) -> Result:
    """Head and divergence, forward and backward, against the three products that they cannot do without."""
    rows, rollouts = job.samples
    packed = pack_scores(rows, rollouts, roles=models.ROLES, config=job.config, buckets=job.buckets)
    supervised = jax.tree.map(jnp.asarray, packed.supervised)
    width, (base, _) = job.config.hidden_size, job.weights
    states = jax.random.normal(jax.random.key(0), (*supervised.role.shape, width), jnp.bfloat16)
    weights = jnp.full(supervised.role.shape, 1e-3)
    objective = ObjectiveConfig(models.ROLES, chunk=32)

    @jax.jit
    @jax.grad
    def fused(student, head):
        states = SupervisedStates(student, head, {"": TeacherStates(0.5 * student, None)})
        return weighted_loss(states, supervised, weights, objective, trains_head=False)[0]

    spent = seconds(lambda: fused(states, base["embedding"]))
    rate = 3 * 2 * supervised.role.size * width * job.config.vocab_size / spent
    detail = (
        ("fused", f"{1e3 * spent:.1f} ms, {rate / 1e12:.0f} TFLOP/s"),
        (
            "entries",
            f"{supervised.role.size} of width {width}, V = {job.config.vocab_size:,}, float32 logits",
        ),
    )
    return Result(
        "divergence", "head and divergence, FLOP/s / those of a product", rate / job.product, None, None, detail
    )


def step(job: Job) -> Result:
    """A whole step by phase: rollout, packing, update."""
    (base, trained), (rows, rollouts) = job.weights, job.samples
    trained = jax.tree.map(jnp.copy, trained)  # a step donates them
    config, buckets = job.config, job.buckets
    tx = optax.adamw(5e-6)
    update = make_train_step(job.model, tx, ObjectiveConfig(models.ROLES, chunk=32), use_dropout=False)
    state = TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained), {})
    sampling = Sampling(max_tokens=job.sizes.completion, **SAMPLED)
    sampler = Sampler(job.model, sampling, eos_ids=(-1,), cache_sizes=(128,))
    phases: dict[str, list[float]] = {"rollout": [], "pack": [], "update": []}
    micro_batches: list[Any] = []
    for i in range(1 + ROUNDS):
        times = [time.perf_counter()]
        prompts = jax.tree.map(jnp.asarray, pack_prompts(rows, config=config, buckets=buckets))
        variables = student_variables(base, state.trained)
        images = sampler.encode(variables, prompts)
        sampler(variables, prompts, row_keys(0, i, job.batch), images)
        times.append(time.perf_counter())
        micro_batches.clear()
        for group in length_groups(rows, rollouts, job.micro_batches):
            part = pack_scores(
                [rows[j] for j in group], [rollouts[j] for j in group],
                roles=models.ROLES, config=config, buckets=buckets, with_images=False,
            )  # fmt: skip
            part = jax.tree.map(jnp.asarray, part)
            micro_batches.append(part.replace(image_embeds=images[np.array(group)]))
        times.append(time.perf_counter())
        state, metrics = update(state, base, micro_batches, jax.random.key(i))
        jax.block_until_ready(metrics["loss"])
        times.append(time.perf_counter())
        for name, a, b in zip(phases, times[:-1], times[1:], strict=True):
            phases[name].append(b - a)
        if i == 0:
            print(f"first step, with compilation: {times[-1] - times[0]:.0f} s", flush=True)
    median = {name: statistics.median(x[1:]) for name, x in phases.items()}
    student, teacher = (
        sum(int(np.sum(x.segment_ids > 0)) for m in micro_batches for x in [getattr(m, side)])
        for side in ("student", "teacher")
    )
    # Forward passes and the pass back to the states; neither the adapters' nor what is recomputed.
    useful = 2 * parameters(base["layers"]) * (2 * student + teacher)
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    whole = sum(median.values())
    detail = (
        *((name, f"{x:.3f} s") for name, x in median.items()),
        ("a step", f"{whole:.2f} s, {job.batch / whole:.1f} rows a second"),
        (
            "rows",
            f"{job.batch}, {job.sizes.completion} sampled each; {student} tokens of the student, {teacher} of teachers",
        ),
        ("peak memory", f"{memory / 1e9:.1f} GB"),
    )
    what = "a whole step; of its update, FLOP/s of the decoder's products / those of a product"
    return Result("step", what, useful / median["update"] / job.product, None, None, detail)


def parts(job: Job) -> dict[str, list[Callable[[], Result]]]:
    """name -> what it measures, in the order of `NAMES`: with the step first, the peak of memory is its own."""
    return {
        "step": [lambda: step(job)],
        "attention": [functools.partial(attention_of, job, name) for name in masks(job)],
        "decode": [functools.partial(decode, job, batch) for batch in job.decode_batches],
        "divergence": [lambda: divergence(job)],
    }


NAMES = ("step", "attention", "decode", "divergence")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="PART", help=", ".join(NAMES))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=pathlib.Path, help="file for the results, a list")
    args = parser.parse_args(argv)
    job = make_job(small=args.small)
    device = jax.devices()[0]
    detail = (("product", f"{job.product / 1e12:.0f} TFLOP/s"), ("copy", f"{job.copy / 1e9:,.0f} GB/s"))
    results = [Result("device", f"{device.device_kind}, jax {jax.__version__}", None, None, None, detail)]
    print(results[0].line(), flush=True)
    for name in (name for name in NAMES if name in args.only):
        for measure in parts(job)[name]:
            results.append(measure())
            print(results[-1].line(), flush=True)
            if args.json:
                args.json.write_text(json.dumps([r.json() for r in results], indent=2) + "\n")
    return 0 if all(r.holds for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
