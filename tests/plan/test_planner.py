"""`--mode plan`: its numbers against counts of their own, its advice, and what the step and the sampler exchange."""

import dataclasses
import functools
import importlib
import json
import math
from unittest import mock

import compiled
import jax
import jax.numpy as jnp
import pytest
import safetensors

from configs import base
from vigos_jax import main
from vigos_jax.demo.world import WORLDS
from vigos_jax.errors import InputError
from vigos_jax.models.published_configs import published_config
from vigos_jax.plan import devices as topologies
from vigos_jax.plan import planner, run_programs
from vigos_jax.plan.abstract_run import describe, device_bytes, model_config_of
from vigos_jax.plan.devices import topology
from vigos_jax.plan.floors import cache_bytes, decode_floor
from vigos_jax.plan.planner import compile_plan
from vigos_jax.plan.program_cost import read_traffic
from vigos_jax.plan.table import Program, report

RANK = 4
TPU = {"xla_backend_optimization_level": compiled.OPTIMIZED["xla_backend_optimization_level"]}


def config_of(**changes):
    """The demo with an adapter, in two micro-batches, on a mesh with every axis."""
    config = base.get_config()
    defaults = {"lora.rank": RANK, "gradient_accumulation_steps": 2, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    config.update_from_flattened_dict(defaults | {"plan.advise": False} | changes)
    return config


@functools.cache
def planned():
    config = config_of()
    return compile_plan(config, topology(config.plan))


@pytest.mark.slow
def test_parameters_are_those_of_the_files():
    total = 0
    for path in WORLDS["demo"].base.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="numpy") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert planned().parameters == total > 500_000


@pytest.mark.slow
def test_an_adapter_its_optimizer_and_the_cache_have_the_sizes_of_their_formulas():
    c = model_config_of("demo")
    d, q, kv, f = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
    widths = [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]
    trained = c.num_layers * RANK * sum(i + o for i, o in widths)
    p = planned()
    assert p.trained == trained
    # Of q, k, v, gate and up A is split by fsdp and B by tensor, of o and down the other way round: all by two.
    assert p.trained_bytes == 4 * trained / 2
    assert p.opt_state_bytes == 8 * trained / 2 + 2 * 4  # two moments, and two counts of steps
    rows, slots = 32 / (2 * 2), p.sizes["prompt"] + 48
    assert p.cache_bytes == 2 * c.num_layers * rows * slots * (c.num_kv_heads / 2) * c.head_dim * 4


@pytest.mark.slow
def test_peaks_are_what_the_compiler_assigns_and_what_stays():
    """Whatever a program does not read is on the device all the same: its arguments and the rest are all that is."""
    p = {x.name: x for x in planned().programs}
    run = describe(config_of(), topology(config_of().plan))
    prompts, trained = device_bytes(run.prompts(32)), device_bytes(run.state.trained)
    stays = device_bytes((run.base, run.state, run.images(32))) + 2 * prompts
    near = functools.partial(pytest.approx, abs=2000)  # keys and scalars
    all_of = {name: x.arguments + x.beside for name, x in p.items()}
    images, micro = device_bytes(run.images(32)), device_bytes(run.scores(16))
    assert all_of["encode"] == near(stays - images)
    assert all_of["prefill"] == near(stays)
    # The compiler may leave more of the gradients whole than of the weights.
    assert stays + trained <= all_of["update"] <= stays + 2 * trained + 2000
    assert stays + micro + trained <= all_of["gradient"] + 2000 <= stays + micro + 2 * trained + 4000
    stays += p["weights"].outputs  # each layer's weights once more
    assert device_bytes(run.base["layers"]) < p["weights"].outputs < 1.25 * device_bytes(run.base["layers"])
    assert stays + planned().cache_bytes < all_of["decode"] < stays + 1.5 * planned().cache_bytes
    assert p["decode"].aliased > planned().cache_bytes  # it is updated where it is
    assert p["encode"].beside > device_bytes(run.base["layers"])  # of the weights it reads the tower alone
    for x in p.values():
        assert x.peak == x.arguments + x.outputs + x.temporaries - x.aliased + x.beside > 0
    assert planned().peak == max(x.peak for x in p.values())


@pytest.mark.slow
def test_the_sampler_is_counted_for_every_token():
    p = {x.name: x for x in planned().programs}
    short = config_of(**{"plan.completion": 12})
    fewer = {x.name: x for x in compile_plan(short, topology(short.plan), only=("decode",)).programs}
    assert p["decode"].flops == 4 * fewer["decode"].flops
    assert sum(p["decode"].moved.values()) == pytest.approx(4 * sum(fewer["decode"].moved.values()), rel=0.03)
    assert p["gradient"].runs == 2 and p["decode"].runs == 1
    assert not any(x.unknown_loops for x in p.values())


def test_time_is_that_of_the_busiest_resource():
    slow = config_of(**{"plan.tflops": 1e-3, "plan.bandwidth_gbs": 1.0, "plan.interconnect_gbs": 1e-3})
    p = next(iter(compile_plan(slow, topology(slow.plan), only=("encode",)).programs))
    rates = topology(slow.plan).rates
    times = p.times(rates)
    assert times["arithmetic"] == p.flops / 1e9 and times["memory"] == p.traffic / 1e9
    assert times["interconnect"] == sum(p.moved.values()) / 1e6 > max(times["arithmetic"], times["memory"])
    assert p.bound(rates) == ("interconnect", times["interconnect"])


@pytest.mark.parametrize(
    "name, layers, d, q, kv, f, vocabulary",
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", 36, 2048, 2048, 256, 11008, 151936),  # the head is the embedding
        ("Qwen/Qwen2.5-VL-7B-Instruct", 28, 3584, 3584, 512, 18944, 152064),  # beside it: single rows are read
    ],
)
def test_a_token_reads_the_decoder_and_its_head_once(name, layers, d, q, kv, f, vocabulary):
    """Neither the tower nor, where the head has its own, the embedding; adapters in the dtype of computation."""
    config = importlib.import_module("configs.qwen2_5_vl_3b").get_config()
    config.model.path = name
    config.update_from_flattened_dict({"plan.topology": "cpu:1", "lora.rank": RANK})
    run = describe(config, topology(config.plan))
    layer = d * q + q + 2 * (d * kv + kv) + q * d + 3 * d * f + 2 * d
    adapters = RANK * ((d + q) + 2 * (d + kv) + (q + d) + 3 * (d + f))
    want = layers * (layer + adapters) + d + vocabulary * d
    assert decode_floor(run, slots=10) == 2 * want + 2 * 32 * layers * 10 * 2 * kv


def test_states_are_read_and_written():
    """Qwen3.5-0.8B: 6 of 24 layers have keys and values; each token replaces the others' state and inputs."""
    config = importlib.import_module("configs.qwen3_5_0_8b").get_config()
    config.update_from_flattened_dict({"plan.topology": "cpu:1"})
    run = describe(config, topology(config.plan))
    keys, states = cache_bytes(run, slots=10)
    assert keys == 2 * 6 * 32 * 10 * (2 * 256) * 2
    assert states == 18 * 32 * (16 * 128 * 128 * 4 + 3 * 3 * 2048 * 2)
    assert decode_floor(run, slots=10) - decode_floor(run, slots=0) == keys
    assert decode_floor(run, slots=0) > device_bytes(run.base["layers"]) + 2 * states


@pytest.mark.slow
def test_programs_are_counted():
    p = {x.name: x for x in planned().programs}
    for x in p.values():
        assert x.kernels >= 1 and x.compile_seconds > 0 and x.largest.bytes > 0
    decode, c = p["decode"], model_config_of("demo")
    assert decode.tokens == 48 and {x.tokens for x in p.values() if x is not decode} == {1}
    assert decode.floor / 48 > planned().cache_bytes and decode.traffic > decode.floor
    assert decode.traffic_per_token == decode.traffic / 48 and decode.kernels_per_token == decode.kernels / 48
    assert decode.kernels_per_layer == decode.kernels / 48 / c.num_layers
    assert p["encode"].kernels_per_layer == p["encode"].kernels / c.vision.depth
    assert p["update"].kernels_per_layer == 0 and p["encode"].floor == 0
    text = report(planned()).splitlines()
    header = next(i for i, line in enumerate(text) if line.split()[:2] == ["program", "kernels"])
    rows = {line.split()[0]: line.split() for line in text[header + 1 : header + 1 + len(p)]}
    assert rows["decode"][1:3] == [f"{decode.kernels_per_token:.0f}", f"{decode.kernels_per_layer:.1f}"]
    assert rows["encode"][-1] == p["encode"].largest.shape and rows["update"][2] == "-"
    assert any(line.startswith("decode: ") and f"{decode.traffic / decode.floor:.2f} times" in line for line in text)


@pytest.mark.slow
def test_what_a_card_lacks_is_said():
    config = config_of(**{"model.dtype": "bfloat16"})
    target = dataclasses.replace(topology(config.plan), name="t4:8", platform="gpu")
    notes = lambda **facts: planner._notes(  # noqa: E731
        describe(config, dataclasses.replace(target, **facts)), dataclasses.replace(target, **facts)
    )
    assert notes() == ()
    assert notes(has_bfloat16=False)[0].startswith("t4:8: no bfloat16 units")
    assert notes(has_fused_attention=False) == ("t4:8: no fused attention: attention is XLA's",)
    said = report(dataclasses.replace(planned(), notes=("t4:8: no bfloat16 units",)))
    assert "\nt4:8: no bfloat16 units\n" in said
    config.model.dtype = "float32"
    assert notes(has_bfloat16=False) == ()


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"])
def test_a_published_model_is_planned_without_its_files(name):
    config = importlib.import_module("configs.qwen2_5_vl_3b").get_config()
    config.model.path = name
    run = describe(config, topology(config.plan))
    known = {"Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976, "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696}
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(run.base)) == known[name]
    assert (run.sizes.student, run.sizes.json()["teacher"]) == (2560, 3584)  # 1280 + 1024, and 1024 + 2 * (256 + 1024)
    assert {x.dtype for x in jax.tree.leaves(run.base)} == {jnp.dtype("bfloat16")}


# What is printed, and what it advises.


def run_main(capsys, *changes):
    code = main.main(["vigos_jax", "--config=configs/base.py", "--mode=plan", *(f"--config.{c}" for c in changes)])
    return code, capsys.readouterr()


@pytest.mark.slow
def test_it_prints_a_table_and_writes_the_same_numbers(capsys, tmp_path):
    out, texts = tmp_path / "plan.json", tmp_path / "programs"
    code, said = run_main(capsys, "lora.rank=4", f"plan.output={out}", f"plan.programs={texts}")
    assert code == 0 and said.out.rstrip().endswith("fits")
    saved = json.loads(out.read_text())
    assert saved["fits"] and saved["trained"] == planned().trained and saved["topology"] == "cpu:8"
    assert f"parameters {saved['parameters']:,}, trained {saved['trained']:,}" in said.out
    for program in saved["programs"]:
        assert program["kernels_per_token"] > 0 and program["largest"]["shape"] and program["compile_seconds"] > 0
        assert f"\n{program['name']} " in said.out and (texts / f"{program['name']}.txt").stat().st_size > 100
    names = [p["name"] for p in saved["programs"]]
    assert names == ["encode", "prefill", "weights", "decode", "gradient", "update"]
    assert saved["peak"] == max(p["peak"] for p in saved["programs"])


def test_changes_come_from_the_one_that_costs_least():
    """What leaves the run as it is comes first; only a shorter completion changes what is sampled."""
    config = config_of(**{"gradient_accumulation_steps": 1, "mesh.data": 8, "mesh.fsdp": 1, "mesh.tensor": 1})
    mesh = {"data": 8, "fsdp": 1, "tensor": 1}
    changes = list(planner._changes(config, mesh, {"gradient"}))
    assert changes[:3] == [{"model.remat": "full"}] + [
        {"model.remat": "full", "gradient_accumulation_steps": n} for n in (2, 4)
    ]
    assert changes[3] == {"mesh.data": 4, "mesh.fsdp": 2, "mesh.tensor": 1}
    assert [c["plan.completion"] for c in changes if "plan.completion" in c] == [24, 12] and "mesh.data" in changes[-3]
    assert all(math.prod(c[f"mesh.{a}"] for a in mesh) == 8 for c in changes if "mesh.data" in c)
    others = list(planner._changes(config, mesh, {"gradient", "decode"}))
    assert others == changes[3:]  # less at a time in the gradient does not help the sampler


@pytest.mark.slow
def test_what_does_not_fit_comes_with_the_first_change_that_does():
    """Peaks by formula, so that nothing need be compiled: half of what is left, with each doubling of accumulation."""
    config = config_of(
        **{"gradient_accumulation_steps": 1, "mesh.data": 8, "mesh.fsdp": 1, "mesh.tensor": 1, "plan.memory_gb": 5.0}
    )
    target = topology(config.plan)

    def pretend(config, target, *, only=()):
        assert only in ((), ("gradient",))
        gb = (8 if config.model.remat == "full" else 16) / config.gradient_accumulation_steps
        program = Program("gradient", config.gradient_accumulation_steps, temporaries=int(gb * 1e9))
        return dataclasses.replace(planned(), programs=(program,), rates=target.rates)

    with mock.patch.object(planner, "compile_plan", pretend):
        result = pretend(config, target)
        assert not result.fits
        result = dataclasses.replace(result, **planner._advice(config, target, result))
    assert config.gradient_accumulation_steps == 1  # it is not changed itself
    assert result.advice == "config.model.remat=full, config.gradient_accumulation_steps=2"
    assert result.tried == ("config.model.remat=full: 8.0 GB", f"{result.advice}: 4.0 GB")
    text = report(result).splitlines()
    assert text[-4:] == [
        "does not fit: gradient needs 16.00 GB",
        f"fits with {result.advice}",
        *(f"  tried {change}" for change in result.tried),
    ]


@pytest.mark.slow
def test_what_the_compiler_refuses_does_not_fit():
    refused = dataclasses.replace(planned(), programs=(Program("prefill", 1, refused="used 20.5G of 15.75G"),))
    assert not refused.fits and not refused.is_whole
    assert "does not fit: prefill used 20.5G of 15.75G" in report(refused)
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G."
    assert run_programs._refusal(message) == "Used 20.50G of 15.75G"


@pytest.mark.slow
def test_what_cannot_fit_says_all_that_was_tried(capsys):
    with mock.patch.object(
        planner,
        "_changes",
        lambda *args: iter([{"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 5}]),
    ):
        code, said = run_main(capsys, "lora.rank=4", "plan.memory_gb=1e-6")
    assert code == 0
    end = said.out.splitlines()[-2:]
    assert end[0].startswith("none of the changes tried") and end[1].startswith(
        "  tried config.gradient_accumulation_steps=2: "
    )


# Mistakes: one line, exit code 2.


@pytest.mark.parametrize(
    "changes, words",
    [
        (["plan.topology=v9:2x2"], ["'v9:2x2' is unknown", "v5e:2x4", "cpu:N"]),
        (["plan.topology=v5e:3x7"], ["'v5e:3x7'", "choices"]),
        (["plan.topology=cpu:many"], ["cpu:N", "from 1 to 1024"]),
        (["plan.topology=cpu:64"], ["8 host device(s) already", "xla_force_host_platform_device_count=64"]),
        (["mesh.fsdp=3", "mesh.data=1"], ["fsdp=3", "8 device(s)"]),
        (
            ["plan.topology=cpu:7", "mesh.data=1", "mesh.fsdp=7", "batch_size=28"],
            ["fsdp=7", "does not divide the model", "nearest that do: data=7 fsdp=1 tensor=1"],
        ),
        (["batch_size=12"], ["config.batch_size=12", "the nearest is"]),
        (["model.path=someone/unknown-model"], ["someone/unknown-model", "Qwen/Qwen2.5-VL-3B-Instruct"]),
        (["plan.prompt=2"], ["config.plan.prompt=2", "9 visual tokens"]),
        (["plan.completion=49"], ["config.plan.completion=49", "config.sampling.max_tokens=48"]),
        (["plan.patches=99999"], ["99999", "config.buckets.patches"]),
        (["plan.memory_gb=-1.0"], ["config.plan.memory_gb=-1.0", "at least 0"]),
        (["plan.output=/nowhere/at/all.json"], ["/nowhere/at/all.json", "must exist"]),
    ],
)
def test_mistakes(capsys, changes, words):
    code, said = run_main(capsys, *changes)
    assert code == 2 and said.out == "" and len(said.err.splitlines()) == 1
    for word in words:
        assert word in said.err


def test_a_missing_compiler_is_named(capsys, monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    code, said = run_main(capsys, "plan.topology=v5e:2x4")
    assert code == 2 and "pip install 'vigos-jax[plan]'" in said.err and len(said.err.splitlines()) == 1


# What the step and the sampler exchange, at the published widths and few layers.

LAYERS = 5  # shorter stacks are not loops


def test_a_bfloat16_model_does_not_inherit_a_float32_ones_precision():
    """What the kernels of a TPU refuse: their bfloat16 products in float32, because a float32 model was made before."""
    before = jax.config.jax_default_matmul_precision
    try:
        for dtype, expected in (("float32", "float32"), ("bfloat16", None), ("float32", "float32")):
            config = config_of()
            config.model.dtype = dtype
            describe(config, topology(config.plan))
            assert jax.config.jax_default_matmul_precision == expected
    finally:
        jax.config.update("jax_default_matmul_precision", before)


def reduced(topology_name, **changes):
    """The 3B run with few layers, small sizes, and every row of a micro-batch on a device of its own."""
    config = importlib.import_module("configs.qwen2_5_vl_3b").get_config()
    small = {"plan.topology": topology_name, "plan.patches": 256, "plan.prompt": 320, "plan.completion": 192}
    config.update_from_flattened_dict(small | changes)
    raw = published_config(config.model.path) | {"num_hidden_layers": LAYERS}
    raw["vision_config"] = raw["vision_config"] | {"depth": LAYERS, "fullatt_block_indexes": [LAYERS - 1]}
    with mock.patch("vigos_jax.plan.abstract_run.published_config", lambda path: raw):
        return describe(config, topology(config.plan)), config


@pytest.mark.parametrize("kind, bits", [("int8", 8), ("nf4", 4.25)])
def test_a_quantised_base_is_planned_as_codes_and_scales(kind, bits):
    plain, _ = reduced("cpu:1")
    run, _ = reduced("cpu:1", **{"model.quantization": kind})
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    for name in ("q_proj", "o_proj"):
        kernel, codes = (r.base["layers"][name]["kernel"] for r in (plain, run))
        assert size(codes) == pytest.approx(bits / 8 * kernel.size, rel=0.003) and codes.kernel_shape == kernel.shape
    assert size(run.base["visual"]) == size(plain.base["visual"]) and run.student["params"] is not None
    assert size(run.student["params"]) == size(run.base) == device_bytes(run.base) < 0.8 * size(plain.base)


def test_a_plan_of_all_weights_in_a_few_bits_is_refused():
    with pytest.raises(InputError, match="quantization=nf4 needs an adapter"):
        reduced("cpu:1", **{"model.quantization": "nf4", "lora.rank": 0})


def dims(name):
    """Sorted dimensions of "bf16[1,2048,64]" without ones."""
    return tuple(sorted(int(d) for d in name.split("[")[1].rstrip("]").split(",") if d not in ("", "1")))


def gradient_faults(run, text, *, devices=8):
    """Exchanges of the gradient program that are neither a layer's weights, fetched in its layer's turn, nor the
    gradients of adapters, nor small: numbers per row, token ids, the states of embedded tokens.
    """
    part = lambda tree: {tuple(sorted(d for d in x.shape[1:] if d != 1)) for x in jax.tree.leaves(tree)}  # noqa: E731
    layer, adapters = part(run.base["layers"]) | part(run.state.trained), part(run.state.trained)
    pieces = {tuple(sorted(p)) for s in layer for i in range(len(s)) for p in [(*s[:i], s[i] // devices, *s[i + 1 :])]}
    head = tuple(sorted(run.base["embedding"].shape))
    faults = []
    traffic = read_traffic(text, devices=devices)
    for c in traffic.collectives:
        for name in c.shapes:
            shape, size = dims(name.split(" x ")[-1]), math.prod(dims(name))
            if size < 30_000 or name.startswith(("s32", "u32", "pred")):
                continue
            is_reduction = c.kind in ("all-reduce", "reduce-scatter")
            if is_reduction and "transpose" in c.source and shape in adapters | pieces:
                continue
            if c.kind in ("all-gather", "collective-permute") and c.depth >= 1 and shape in layer | pieces:
                continue
            if c.kind == "all-gather" and c.depth == 0 and shape == head and "head" in c.source:
                continue
            if c.kind == "all-to-all" and c.depth == 0 and "gather" in c.source:
                continue
            faults.append(f"{c.kind} {name} in {c.depth} loop(s) for {c.source}")
    assert traffic.collectives
    return faults


def compiled_gradient(run, config, **options):
    step = run_programs.train_step_of(config, run.model, run.objective, run.tx, run.state)
    micro = config.batch_size // config.gradient_accumulation_steps
    shares, key = (
        run.whole(jnp.float32, len(run.objective.roles)),
        run.whole(jax.eval_shape(lambda: jax.random.key(0)).dtype),
    )
    args = (run.state.trained, run.base, run.state.average, run.scores(micro), shares, key, run.others)
    return step.gradient.lower(*args).compile(options).as_text()


@pytest.mark.slow
def test_the_gradient_program_fetches_weights_layer_by_layer_and_reduces_adapters_alone():
    run, config = reduced("cpu:8")
    text = compiled_gradient(run, config)
    assert gradient_faults(run, text) == []
    # A stack of all layers that is fetched as a whole, and a kernel's gradient that is summed.
    stack = f"bf16[{LAYERS},2048,11008]"
    entry = text.index("ENTRY")
    end = text.index("ROOT", entry)
    planted = f"%planted = {stack} all-gather(%x), replica_groups=[1,8]<=[8]\n  "
    assert stack in gradient_faults(run, text[:end] + planted + text[end:])[0]
    planted = '%planted = f32[2048,11008] all-reduce(%x), metadata={op_name="transpose(jvp(x))/up_proj"}\n  '
    assert "2048,11008" in gradient_faults(run, text[:end] + planted + text[end:])[0]


@pytest.mark.slow
def test_without_places_for_hidden_states_every_device_computes_every_row():
    run, config = reduced("cpu:8")
    with mock.patch("jax.lax.with_sharding_constraint", lambda x, sharding: x):
        faults = gradient_faults(run, compiled_gradient(run, config))
    assert any("reduce" in f and "11008" in f for f in faults)


@pytest.mark.slow
def test_no_weight_moves_while_tokens_are_sampled():
    """One token per row: hidden states travel, weights stay."""
    run, config = reduced("cpu:8")
    sampler = run_programs.sampler_of(run)
    keys = run.whole(jax.eval_shape(lambda: jax.random.key(0)).dtype, 32)
    target = topology(config.plan)
    measure = functools.partial(run_programs.measured, run, target, sampler_steps=1, beside=0)
    _, state = measure("prefill", 1, sampler.programs.prefill, run.student, run.prompts(32), run.images(32), keys)
    k = state.cache.layers[0].k
    assert k.sharding.shard_shape(k.shape)[0] == 32 // 8
    _, own = measure("weights", 1, sampler.programs.weights, run.student)
    args = (sampler.weights(run.student, own), state, run.whole(jnp.int32))
    traffic = read_traffic(sampler.programs.decode.lower(*args).compile().as_text(), devices=8)
    kernels = {math.prod(x.shape[1:]) for x in jax.tree.leaves(run.base["layers"]) if x.ndim == 3}
    kernels |= {run.base["embedding"].size}
    for c in traffic.collectives:
        for name in c.shapes:
            assert math.prod(dims(name)) not in kernels, (name, c.source)
            assert math.prod(dims(name)) <= 32 * max(11008, 151936 if c.depth == 1 else 0), (name, c.source)


@pytest.mark.slow
def test_so_it_is_on_a_tpu():
    run, config = reduced("v5e:2x4")
    assert run.model.attention == "splash"
    text = compiled_gradient(run, config, exec_time_optimization_effort=-1.0, **TPU)
    assert "tpu_custom_call" in text  # the kernel
    assert gradient_faults(run, text) == []
