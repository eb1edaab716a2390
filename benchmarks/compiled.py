"""What the compilers of an H100 and of a v5e make of a run, without either: bytes, kernels, arrays, memory.

The gates need no clock. Those of the H100 need `pip install 'vigos-jax[plan-gpu]'`, those of the v5e libtpu.
"""

import functools
import json
import math
import pathlib
import re
import tempfile

from benchmarks.harness import Result
from configs import qwen2_5_vl_3b, qwen2_5_vl_7b, qwen3_5_0_8b
from vigos_jax.models.published_configs import published_config
from vigos_jax.plan.devices import topology
from vigos_jax.plan.planner import compile_plan
from vigos_jax.plan.table import Plan, Program

H100, V5E = "h100:1", "v5e:1x1"
_CONFIGS = {"3B": qwen2_5_vl_3b, "7B": qwen2_5_vl_7b, "Qwen3.5-0.8B": qwen3_5_0_8b}
_ALL, _DECODE = (), ("decode",)  # programs
# Norm, product, low-rank product and rotation; two writes to the cache; attention; two products; norm, two products,
# activation, two products. Every second layer writes out the sum of the states behind it: 15 and a half.
KERNELS = 16
_DIMS = re.compile(r"\b(?:bf16|f16|f32|pred)\[([\d,]+)\]")


@functools.cache
def planned(model: str, where: str, only: tuple[str, ...], layers: int) -> tuple[Plan, dict[str, str]]:
    """A config's programs compiled for one device, and their texts by name.

    Args:
      only: see `compile_plan`.
      layers: of the decoder; 0 for all.
    """
    config = _CONFIGS[model].get_config()
    config.plan.topology = where
    if where == V5E:  # two rows at a time: the same update from less memory
        config.gradient_accumulation_steps = 16
    with tempfile.TemporaryDirectory() as folder:
        config.plan.programs = folder
        if layers:
            published = published_config(config.model.path) | {"num_hidden_layers": layers}
            pathlib.Path(folder, "config.json").write_text(json.dumps(published))
            config.model.path = folder
        plan = compile_plan(config, topology(config.plan), only=only)
        return plan, {path.stem: path.read_text() for path in pathlib.Path(folder).glob("*.txt")}


def _decode(model: str, where: str, only: tuple[str, ...], layers: int = 0) -> Program:
    plan, _ = planned(model, where, only, layers)
    return next(p for p in plan.programs if p.name == "decode")


def decode_bytes(model: str, where: str, only: tuple[str, ...], name: str) -> Result:
    """Bytes a decoded token must move / bytes it moves; 0.8 is 1.25 times the floor.

    Args:
      only: programs to compile; all where other gates need them too.
    """
    p = _decode(model, where, only)
    moved, floor = p.traffic_per_token, p.floor / p.tokens
    detail = (
        ("moved", f"{moved / 1e9:.1f} GB, {moved / floor:.2f} times the floor"),
        ("floor", f"{floor / 1e9:.1f} GB: weights, head, adapters and cache once each, recurrent states twice"),
        ("kernels", f"{p.kernels_per_token:.0f} a token, {p.kernels_per_layer:.1f} for each of {p.layers} layers"),
        ("compiled in", f"{p.compile_seconds:.0f} s"),
    )
    what = f"bytes of a decoded token, floor / compiled program, {model}, B = 32, {where}"
    return Result(name, what, floor / moved, 0.8, None, detail)


def decode_kernels() -> Result:
    """Kernels a layer against those that the data flow asks for."""
    whole, short = _decode("3B", H100, _ALL), _decode("3B", H100, _DECODE, 4)
    layers = whole.layers - short.layers
    launched = (whole.kernels_per_token - short.kernels_per_token) / layers
    split = (whole.split_sums / whole.tokens - short.split_sums / short.tokens) / layers
    detail = (
        ("launched", f"{whole.kernels_per_token:.0f} a token, {launched:.1f} for each of {whole.layers} layers"),
        ("not counted", f"of these {split:.1f} add up products which the compiler, without a card to time, split"),
    )
    what = f"kernels a layer of a decoded token, {KERNELS} / compiled program, 3B, {H100}"
    return Result("decode_kernels_h100", what, KERNELS / (launched - split), 1.0, None, detail)


def arrays_of_logits(text: str, lengths: set[int]) -> list[str]:
    """Arrays of a compiled program with a query and a key dimension: two of these lengths, over at least one head."""
    found = set()
    for dims in _DIMS.findall(text):
        sizes = [int(d) for d in dims.split(",")]
        if sum(d in lengths for d in sizes) >= 2 and math.prod(sizes) > max(lengths) ** 2:
            found.add(f"[{dims}]")
    return sorted(found)


def logits(where: str, name: str) -> Result:
    """Whether no program holds attention logits or weights, and how large its largest array is."""
    plan, texts = planned("3B", where, _ALL, 0)
    s = plan.sizes
    lengths = {
        "encode": {s["patches"]},
        "prefill": {s["prompt"]},
        "gradient": {s["student"], s["teacher"]},
    }
    found = [f"{program} {x}" for program, own in lengths.items() for x in arrays_of_logits(texts[program], own)]
    largest = {p.name: p.largest for p in plan.programs if p.largest}
    detail = [(k, f"largest array {x.bytes / 1e9:.2f} GB, {x.shape}, {x.source[-60:]}") for k, x in largest.items()]
    detail.append(("of logits", ", ".join(found[:4]) or "none"))
    what = f"programs without an array of attention logits or weights, 3B, {where}"
    clean = len(lengths) - len({x.split()[0] for x in found})
    return Result(name, what, clean / len(lengths), 1.0, None, tuple(detail))


def memory(model: str, where: str, name: str) -> Result:
    """What one device has / what the run takes at its peak, with all 32 rows."""
    plan, _ = planned(model, where, _ALL, 0)
    detail = tuple((p.name, p.refused or f"{p.peak / 1e9:.1f} GB") for p in plan.programs)
    ratio = plan.rates.memory_gb * 1e9 / plan.peak if plan.is_whole else 0.0
    return Result(name, f"memory / peak of the {model} run, B = 32, {where}", ratio, 1.0, None, detail)


GATES = {
    "decode_bytes_h100": functools.partial(decode_bytes, "3B", H100, _ALL, "decode_bytes_h100"),
    "decode_kernels_h100": decode_kernels,
    "decode_bytes_v5e": functools.partial(decode_bytes, "3B", V5E, _ALL, "decode_bytes_v5e"),
    "decode_bytes_qwen3_5_h100": functools.partial(
        decode_bytes, "Qwen3.5-0.8B", H100, _DECODE, "decode_bytes_qwen3_5_h100"
    ),
    "logits_h100": functools.partial(logits, H100, "logits_h100"),
    "logits_v5e": functools.partial(logits, V5E, "logits_v5e"),
    "memory_7b_h100": functools.partial(memory, "7B", H100, "memory_7b_h100"),
    "memory_3b_v5e": functools.partial(memory, "3B", V5E, "memory_3b_v5e"),
}
