"""Counting in programs: operations against formulas and XLA, exchanges against programs whose exchanges are known."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vigos_jax.models.inputs import TextInputs
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.plan.operations import traced_flops
from vigos_jax.plan.program_cost import read_traffic
from vigos_jax.runtime.sharding import make_mesh

D, LAYERS = 64, 6


def layers(weights, x):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


# Operations.


def test_a_loops_operations_count_as_often_as_it_runs():
    weights, x = abstract(LAYERS, D, D), abstract(32, D)
    want = LAYERS * 2 * 32 * D * D
    assert traced_flops(layers, weights, x) == want
    assert jax.jit(layers).lower(weights, x).compile().cost_analysis()["flops"] < want / 2  # why we count ourselves

    def unrolled(weights, x):
        for i in range(LAYERS):
            x = x @ weights[i]
        return x

    assert jax.jit(unrolled).lower(weights, x).compile().cost_analysis()["flops"] == pytest.approx(want, rel=0.01)


def test_recomputation_and_gradients_are_counted():
    def loss(weights, x, remat):
        body = lambda x, w: (jnp.sin(x @ w), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(jax.checkpoint(body, prevent_cse=False) if remat else body, x, weights)[0])

    weights, x = abstract(LAYERS, D, D), abstract(32, D)
    one = LAYERS * 2 * 32 * D * D
    count = lambda remat: traced_flops(jax.grad(functools.partial(loss, remat=remat), (0, 1)), weights, x)  # noqa: E731
    assert count(False) == 3 * one
    assert count(True) == 4 * one


def test_while_loops_run_as_often_as_told_and_branches_cost_their_dearest_side():
    def f(x, w, n):
        x = jax.lax.fori_loop(0, n, lambda i, x: x @ w, x)
        return jax.lax.cond(n > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    assert traced_flops(f, abstract(D, D), abstract(D, D), abstract(dtype=jnp.int32), trip_count=7) == 9 * 2 * D**3


def forward(model):
    """(function, arguments) of a decoder on 2 rows of 24 tokens."""
    int32 = functools.partial(abstract, dtype=jnp.int32)
    text = TextInputs(int32(2, 24), int32(2, 3, 24), int32(2, 24), int32(2, 24))
    function = lambda v, text, images: model.apply(v, text, images)[0]  # noqa: E731
    return function, (abstract_variables(model), text, abstract(2, 0, model.config.hidden_size))


def test_a_models_operations_are_those_of_its_dimensions():
    c, b, t = tiny.CONFIG, 2, 24
    per_token = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    per_token += 3 * c.hidden_size * c.intermediate_size
    attention = 2 * b * t * t * c.num_heads * c.head_dim
    adapters = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_variables(tiny.MODEL)["lora"]))
    want = c.num_layers * (b * t * per_token + attention) + b * t * adapters
    assert traced_flops(*(lambda f, args: (f, *args))(*forward(tiny.MODEL))) == 2 * want


def test_a_models_operations_are_xlas_where_its_layers_are_no_loop():
    wide = dataclasses.replace(tiny.CONFIG, hidden_size=128, num_heads=16, num_kv_heads=8, intermediate_size=512)
    wide = dataclasses.replace(wide, vision=dataclasses.replace(wide.vision, out_hidden_size=128))
    function, args = forward(VisionLanguageModel(wide))
    xla = jax.jit(function).lower(*args).compile().cost_analysis()["flops"]
    assert traced_flops(function, *args) == pytest.approx(xla, rel=0.06)  # it counts norms and the like, too


# Exchanges.

HAND_WRITTEN = """\
HloModule jit_f, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%start (p: bf16[8,16]) -> bf16[64,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %gather.1 = bf16[64,16]{1,0} all-gather(%p), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}
}

%done (p: bf16[8,16]) -> bf16[64,16] {
  %p.1 = bf16[8,16]{1,0} parameter(0)
  ROOT %gather.2 = bf16[64,16]{1,0} all-gather(%p.1), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}
}

%all-reduce-scatter.1 (p: f32[80]) -> f32[10] {
  %p.2 = f32[80]{0} parameter(0)
  %sum.1 = f32[80]{0} all-reduce(%p.2), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %part = f32[10]{0} dynamic-slice(%sum.1, %zero), dynamic_slice_sizes={10}
}

%body (s: (s32[], bf16[8,16], f32[80])) -> (s32[], bf16[8,16], f32[80]) {
  %s = (s32[], bf16[8,16]{1,0}, f32[80]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%s), index=1
  %y = f32[80]{0} get-tuple-element(%s), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %f.1 = bf16[64,16]{1,0} fusion(%x), kind=kCustom, calls=%start
  %f.2 = bf16[64,16]{1,0} fusion(%x), kind=kCustom, calls=%done
  %f.3 = f32[10]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %turn = (bf16[8,16]{1,0}, bf16[8,16]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=7, source_target_pairs={{0,1},{1,0}}
  %turned = bf16[8,16]{1,0} collective-permute-done(%turn)
  ROOT %t = (s32[], bf16[8,16]{1,0}, f32[80]{0}) tuple(%next, %turned, %y)
}

%cond (s: (s32[], bf16[8,16], f32[80])) -> pred[] {
  %limit = s32[] constant(12)
  %s.1 = (s32[], bf16[8,16]{1,0}, f32[80]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

%forever (s: (s32[], bf16[8,16], f32[80])) -> pred[] {
  %s.2 = (s32[], bf16[8,16]{1,0}, f32[80]{0}) parameter(0)
  ROOT %go = pred[] custom-call(%s.2), custom_call_target="ask"
}

ENTRY %main (x: (s32[], bf16[8,16], f32[80])) -> f32[100] {
  %x.1 = (s32[], bf16[8,16]{1,0}, f32[80]{0}) parameter(0)
  %w = (s32[], bf16[8,16]{1,0}, f32[80]{0}) while(%x.1), condition=%cond, body=%body
  %w.1 = (s32[], bf16[8,16]{1,0}, f32[80]{0}) while(%w), condition=%forever, body=%body, metadata={op_name="jit(f)/while"}
  %c = f32[100]{0} constant({...})
  ROOT %r = f32[100]{0} all-reduce(%c), channel_id=1, replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%sum
}
"""  # noqa: E501


def test_a_hand_written_program():
    """Two loops of the same body: one counts to 12 by twos, the other's length is not in the program."""
    traffic = read_traffic(HAND_WRITTEN, devices=8, trip_count=100)
    assert traffic.unknown_loops == ("jit(f)/while",)
    by_kind = {(c.kind, c.executions): c for c in traffic.collectives}
    assert len(by_kind) == len(traffic.collectives) == 7  # a gather that two fusions share is one
    for trips in (6, 100):
        assert by_kind["all-gather", trips].moved == 64 * 16 * 2 * 7 / 8
        assert by_kind["all-gather", trips].depth == 1
        assert by_kind["collective-permute", trips].moved == 8 * 16 * 2
        assert by_kind["reduce-scatter", trips].moved == 80 * 4 * 7 / 8
    last = by_kind["all-reduce", 1]
    assert (last.moved, last.depth, last.shapes) == (100 * 4 * 2 * 3 / 4, 0, ("f32[100]",))
    assert traffic.moved()["all-gather"] == 106 * 64 * 16 * 2 * 7 / 8


def test_what_a_compiled_program_exchanges():
    """A sum of [16, 32] over 8 devices in each of 5 passes, and one gather of [8, 64] floats behind them."""
    mesh = make_mesh(data=8, fsdp=1, tensor=1)

    def local(x, y):
        x, _ = jax.lax.scan(lambda x, _: (jnp.sin(jax.lax.psum(x, "data")), None), x, None, length=5)
        return x, jax.lax.all_gather(y, "data", tiled=True)

    f = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()), check_vma=False)
    compiled = jax.jit(f).lower(abstract(16, 32), abstract(8, 64)).compile()
    traffic = read_traffic(compiled.as_text(), devices=8)
    assert not traffic.unknown_loops
    assert traffic.moved() == {"all-reduce": 5 * 16 * 32 * 4 * 2 * 7 / 8, "all-gather": 8 * 64 * 4 * 7 / 8}
    found = {(c.kind, c.executions, c.depth) for c in traffic.collectives}
    assert found == {("all-gather", 1, 0), ("all-reduce", 5, 1)}


# Memory.


def test_a_loop_over_stacked_weights_reads_each_once():
    """Not the whole stack in every pass."""
    weights, x = abstract(LAYERS, 512, 512), abstract(4, 512)
    text = jax.jit(layers).lower(weights, x).compile().as_text()
    size = 4 * LAYERS * 512 * 512
    assert size < read_traffic(text, devices=1).memory < 3.5 * size  # a CPU may copy each before it multiplies
    assert read_traffic(text.replace("dynamic-slice", "unknown"), devices=1).memory > 5 * size


def test_16_bit_floats_that_a_cpu_computes_in_32_bits_count_as_they_are():
    weights, x = abstract(LAYERS, 512, 512, dtype=jnp.bfloat16), abstract(4, 512, dtype=jnp.bfloat16)
    text = jax.jit(layers).lower(weights, x).compile().as_text()
    size = 2 * LAYERS * 512 * 512
    assert 0.9 * size < read_traffic(text, devices=1, emulates_16_bits=True).memory < 3.5 * size
    assert read_traffic(text, devices=1).memory > 1.5 * read_traffic(text, devices=1, emulates_16_bits=True).memory


def test_a_sharded_product_exchanges_what_its_placement_implies():
    mesh = make_mesh(data=1, fsdp=8, tensor=1)
    put = lambda spec, *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))  # noqa: E731
    f = jax.jit(lambda x, w: x @ w, out_shardings=NamedSharding(mesh, P()))
    compiled = f.lower(put(P(None, "fsdp"), 16, 64), put(P("fsdp", None), 64, 32)).compile()
    assert read_traffic(compiled.as_text(), devices=8).moved() == {"all-reduce": 16 * 32 * 4 * 2 * 7 / 8}
