"""Bytes, kernels and arrays of compiled GPU programs, against counts by hand; no compiler is needed."""

import pathlib
import re

import pytest

from vigos_jax.plan.program_cost import read_traffic

FIXTURE = (pathlib.Path(__file__).parents[1] / "fixtures" / "h100_two_layers.txt").read_text()

# The fixture is `decode` of test_gpu.py as XLA compiles it for an H100: two stacked layers in bfloat16, one token for
# each of 32 rows, width 512, hidden 2048, a cache of 256 slots. Bytes of its arrays:
X = 32 * 512 * 2  # bf16[32,512], hidden states
HIDDEN = 32 * 2048 * 2  # bf16[32,2048]
WEIGHT = 512 * 2048 * 2  # one layer's bf16[512,2048] or bf16[2048,512], half of its stack
CACHE = 32 * 256 * 512 * 2  # one layer's bf16[32,256,512], half of the stack
LOGITS, PROBABILITIES = 32 * 256 * 4, 32 * 256 * 2  # f32[32,256], bf16[32,256]
PARTIAL = 4 * 32 * 2048 * 4  # f32[4,32,2048] and f32[16,32,512]: both products are split
INDEX = 4  # s32[]

# What each kernel reads, then what it writes.
ONCE = [
    INDEX + INDEX,  # copy.17: the counter's first value
    X + X,  # copy.16
    2 * CACHE + 2 * CACHE,  # wrapped_transpose: the whole cache into the layout of the loop
    2 * CACHE + 2 * CACHE,  # input_transpose_fusion: and back
]
EACH_LAYER = [
    (WEIGHT + INDEX) + WEIGHT,  # loop_dynamic_slice_fusion: one layer of a stack, copied
    (WEIGHT + INDEX) + WEIGHT,  # loop_dynamic_slice_fusion.1
    (X + WEIGHT) + PARTIAL,  # gemm_fusion_dot
    PARTIAL + HIDDEN,  # loop_convert_fusion: sums the partial products, silu
    (HIDDEN + WEIGHT) + PARTIAL,  # gemm_fusion_dot.1
    (X + PARTIAL) + X,  # loop_add_fusion: sums the partial products, adds the input
    (X + CACHE + 2 * INDEX) + LOGITS,  # input_reduce_fusion: one layer of the updated cache, by hidden states
    LOGITS + PROBABILITIES,  # fusion.16: softmax
    (X + CACHE + PROBABILITIES + 2 * INDEX) + X,  # input_reduce_fusion.1: the same layer, by probabilities
    (X + X) + X,  # wrapped_add
    (X + 2 * INDEX) + X,  # loop_dynamic_update_slice_fusion: one slot of one layer, in place
    INDEX + INDEX,  # loop_add_fusion.1: the counter
    INDEX + 1,  # loop_compare_fusion: whether the loop goes on, a pred[]
]


def count(text, **options):
    return read_traffic(text, devices=1, **options)


def test_a_real_program_for_an_h100():
    traffic = count(FIXTURE)
    assert traffic.memory == sum(ONCE) + 2 * sum(EACH_LAYER) == 135_725_154
    assert traffic.kernels == len(ONCE) + 2 * len(EACH_LAYER) == 30
    assert traffic.split_sums == 2 * 2
    assert (traffic.largest.bytes, traffic.largest.shape) == (2 * CACHE, "bf16[32,512,2,256]")  # the transposed cache
    assert not traffic.unknown_loops and not traffic.collectives


@pytest.mark.parametrize(
    "broken, more",
    [
        # Without slices both stacks and the cache, but for the updated slot, are read whole, by two kernels each.
        (lambda text: text.replace(" dynamic-slice(", " unknown("), 2 * (2 * WEIGHT + 2 * (CACHE - X))),
        # Without updates in place the whole cache is read and written for one slot, and for a layer's slice of it.
        (lambda text: text.replace(" dynamic-update-slice(", " add("), 2 * (2 * CACHE + 2 * CACHE - X)),
        # Without its number of passes the loop runs as often as the caller says.
        (
            lambda text: re.sub(r"known_trip_count", "x", text).replace("direction=LT", "direction=GT"),
            98 * sum(EACH_LAYER),
        ),
    ],
)
def test_what_is_found_in_it_is_needed(broken, more):
    assert count(broken(FIXTURE), trip_count=100).memory == sum(ONCE) + 2 * sum(EACH_LAYER) + more


def test_products_that_are_not_split_have_no_sums():
    assert count(FIXTURE.replace("lhs_batch_dims={0}", "lhs_batch_dims={}")).split_sums == 0
    assert count(FIXTURE.replace("dimensions={0}, to_apply=%dot.reduce", "dimensions={1}, to_apply=%x")).split_sums == 2


# Smaller programs, each of one kernel: computations, and the instruction that runs them.

STACK = "bf16[8,64,64]"
ENTRY = """
ENTRY %main (a: {stack}, i: s32[]) -> f32[] {{
  %a = {stack}{{2,1,0}} parameter(0)
  %b = {stack}{{2,1,0}} parameter(1)
  %i = s32[] parameter(2)
  %j = s32[16]{{0}} parameter(3)
  %x = bf16[32,64]{{1,0}} parameter(4)
{lines}
}}
"""
SLICE, WHOLE = 64 * 64 * 2, 8 * 64 * 64 * 2


def program(lines, computations=""):
    return "HloModule f\n" + computations + ENTRY.format(stack=STACK, lines=lines)


NESTED = """
%left (p: bf16[8,64,64], q: s32[]) -> bf16[64,64] {
  %p = bf16[8,64,64]{2,1,0} parameter(0)
  %q = s32[] parameter(1)
  %zero = s32[] constant(0)
  %take = bf16[1,64,64]{2,1,0} dynamic-slice(%p, %q, %zero, %zero), dynamic_slice_sizes={1,64,64}
  ROOT %view = bf16[64,64]{1,0} bitcast(%take)
}

%right (r: bf16[32,64]) -> bf16[32,64] {
  %r = bf16[32,64]{1,0} parameter(0)
  ROOT %minus = bf16[32,64]{1,0} negate(%r)
}

%product (s: bf16[32,64], t: bf16[8,64,64], u: s32[]) -> bf16[32,64] {
  %s = bf16[32,64]{1,0} parameter(0)
  %t = bf16[8,64,64]{2,1,0} parameter(1)
  %u = s32[] parameter(2)
  %lhs = bf16[64,64]{1,0} fusion(%t, %u), kind=kCustom, calls=%left
  %rhs = bf16[32,64]{1,0} fusion(%s), kind=kCustom, calls=%right
  ROOT %dot = bf16[32,64]{1,0} dot(%rhs, %lhs), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""

RESULTS = """
%several (p: bf16[8,64,64], q: bf16[8,64,64], n: s32[], x: bf16[32,64]) -> (bf16[64,64], bf16[8,64,64], bf16[8,64,64]) {
  %p = bf16[8,64,64]{2,1,0} parameter(0)
  %q = bf16[8,64,64]{2,1,0} parameter(1)
  %n = s32[] parameter(2)
  %x = bf16[32,64]{1,0} parameter(3)
  %zero = s32[] constant(0)
  %one = bf16[1,64,64]{2,1,0} dynamic-slice(%p, %n, %zero, %zero), dynamic_slice_sizes={1,64,64}
  %again = bf16[1,64,64]{2,1,0} dynamic-slice(%p, %n, %zero, %zero), dynamic_slice_sizes={1,64,64}
  %other = bf16[1,64,64]{2,1,0} slice(%p), slice={[3:4], [0:64], [0:64]}
  %sum = bf16[1,64,64]{2,1,0} add(%one, %other)
  %sums = bf16[1,64,64]{2,1,0} add(%sum, %again)
  %view = bf16[64,64]{1,0} bitcast(%sums)
  %rows = bf16[1,32,64]{2,1,0} bitcast(%x)
  %new = bf16[8,64,64]{2,1,0} dynamic-update-slice(%q, %rows, %n, %zero, %zero)
  %minus = bf16[8,64,64]{2,1,0} negate(%p)
  ROOT %all = (bf16[64,64]{1,0}, bf16[8,64,64]{2,1,0}, bf16[8,64,64]{2,1,0}) tuple(%view, %new, %minus)
}
"""

INSIDE = """
%negate (p: bf16[8,64,64]) -> bf16[8,64,64] {
  %p = bf16[8,64,64]{2,1,0} parameter(0)
  ROOT %minus = bf16[8,64,64]{2,1,0} negate(%p)
}

%write (q: bf16[8,64,64], n: s32[], x: bf16[32,64]) -> bf16[8,64,64] {
  %q = bf16[8,64,64]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %x = bf16[32,64]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %rows = bf16[1,32,64]{2,1,0} bitcast(%x)
  ROOT %new = bf16[8,64,64]{2,1,0} dynamic-update-slice(%q, %rows, %n, %zero, %zero)
}

%outer (a: bf16[8,64,64], b: bf16[8,64,64], i: s32[], y: bf16[32,64]) -> (bf16[1,64,64], bf16[8,64,64]) {
  %a = bf16[8,64,64]{2,1,0} parameter(0)
  %b = bf16[8,64,64]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %y = bf16[32,64]{1,0} parameter(3)
  %start = s32[] constant(0)
  %less = bf16[8,64,64]{2,1,0} fusion(%a), kind=kLoop, calls=%negate
  %one = bf16[1,64,64]{2,1,0} dynamic-slice(%less, %i, %start, %start), dynamic_slice_sizes={1,64,64}
  %written = bf16[8,64,64]{2,1,0} fusion(%b, %i, %y), kind=kLoop, calls=%write
  ROOT %both = (bf16[1,64,64]{2,1,0}, bf16[8,64,64]{2,1,0}) tuple(%one, %written)
}
"""

TAKE = """
%take (p: bf16[8,64,64], n: s32[16]) -> bf16[16,64] {
  %p = bf16[8,64,64]{2,1,0} parameter(0)
  %rows = bf16[512,64]{1,0} bitcast(%p)
  %twice = bf16[512,64]{1,0} add(%rows, %rows)
  %n = s32[16]{0} parameter(1)
  ROOT %taken = bf16[16,64]{1,0} gather(%twice, %n), offset_dims={1}, collapsed_slice_dims={0}, start_index_map={0}
}
"""

PUT = """
%sum (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %add = bf16[] add(%a, %b)
}

%put (p: bf16[8,64,64], n: s32[16], v: bf16[16,64]) -> bf16[512,64] {
  %p = bf16[8,64,64]{2,1,0} parameter(0)
  %rows = bf16[512,64]{1,0} bitcast(%p)
  %n = s32[16]{0} parameter(1)
  %v = bf16[16,64]{1,0} parameter(2)
  ROOT %put = bf16[512,64]{1,0} scatter(%rows, %n, %v), update_window_dims={1}, to_apply=%sum
}
"""

SOFTMAX = """
%max (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %m = f32[] maximum(%a, %b)
}

%softmax (p: bf16[32,64], s: bf16[8,64,64]) -> bf16[32,64] {
  %p = bf16[32,64]{1,0} parameter(0)
  %s = bf16[8,64,64]{2,1,0} parameter(1)
  %part = bf16[1,32,64]{2,1,0} slice(%s), slice={[2:3], [0:32], [0:64]}
  %bias = bf16[32,64]{1,0} bitcast(%part)
  %biased = bf16[32,64]{1,0} add(%p, %bias)
  %wide = f32[32,64]{1,0} convert(%biased)
  %low = f32[] constant(-inf)
  %largest = f32[32]{0} reduce(%wide, %low), dimensions={1}, to_apply=%max
  %spread = f32[32,64]{1,0} broadcast(%largest), dimensions={0}
  %less = f32[32,64]{1,0} subtract(%wide, %spread)
  ROOT %out = bf16[32,64]{1,0} convert(%less)
}
"""

REDUCE = """
%both (a: f32[], b: f32[], c: f32[], d: f32[]) -> (f32[], f32[]) {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  %c = f32[] parameter(2)
  %d = f32[] parameter(3)
  %ac = f32[] add(%a, %c)
  %bd = f32[] add(%b, %d)
  ROOT %t = (f32[], f32[]) tuple(%ac, %bd)
}

%sums (p: bf16[8,64,64]) -> ((f32[8,64], f32[8,64]), f32[8,64,64]) {
  %p = bf16[8,64,64]{2,1,0} parameter(0)
  %wide = f32[8,64,64]{2,1,0} convert(%p)
  %less = f32[8,64,64]{2,1,0} negate(%wide)
  %zero = f32[] constant(0)
  %two = (f32[8,64]{1,0}, f32[8,64]{1,0}) reduce(%wide, %less, %zero, %zero), dimensions={2}, to_apply=%both
  ROOT %all = ((f32[8,64]{1,0}, f32[8,64]{1,0}), f32[8,64,64]{2,1,0}) tuple(%two, %less)
}
"""

ASYNC = """
%copied (p: bf16[8,64,64]) -> bf16[8,64,64] {
  %p = bf16[8,64,64]{2,1,0} parameter(0)
  ROOT %copy = bf16[8,64,64]{2,1,0} copy(%p)
}
"""

X_BYTES, J_BYTES, TAKEN = 32 * 64 * 2, 16 * 4, 16 * 64 * 2
CUDNN = 'custom-call(%x, %x, %a, %i, %i), custom_call_target="__cudnn$fmhaSoftmax"'
CASES = {
    # One slice through an inner fusion, and the other operand through another.
    "nested fusions of a product": (
        "  ROOT %f = bf16[32,64]{1,0} fusion(%x, %a, %i), kind=kCustom, calls=%product", NESTED,
        (X_BYTES + SLICE + 4) + X_BYTES, 1,
    ),
    # What an inner fusion computes is sliced, and another one updates in place.
    "inner fusions of which a part is needed": (
        "  ROOT %f = (bf16[1,64,64]{2,1,0}, bf16[8,64,64]{2,1,0}) fusion(%a, %b, %i, %x), kind=kLoop, calls=%outer",
        INSIDE,
        (SLICE + 4 + X_BYTES) + (SLICE + X_BYTES),
        1,
    ),
    # %a is read whole for %minus whatever else is sliced; of %b nothing is read, and the update alone is written.
    "several results, one in place": (
        "  ROOT %f = (bf16[64,64]{1,0}, bf16[8,64,64]{2,1,0}, bf16[8,64,64]{2,1,0}) fusion(%a, %b, %i, %x), "
        "kind=kLoop, calls=%several", RESULTS,
        (WHOLE + 4 + X_BYTES) + (SLICE + X_BYTES + WHOLE), 1,
    ),
    # Two different slices are read, one of them only once.
    "the same slice twice": (
        "  ROOT %f = (bf16[64,64]{1,0}, bf16[8,64,64]{2,1,0}, bf16[64,64]{1,0}) fusion(%a, %b, %i, %x), "
        "kind=kLoop, calls=%several", RESULTS.replace("negate(%p)", "negate(%x)").replace(
            "%minus = bf16[8,64,64]{2,1,0}", "%minus = bf16[32,64]{1,0}"),
        (2 * SLICE + 4 + X_BYTES) + (SLICE + X_BYTES + SLICE), 1,
    ),
    "a gather of what is computed": (
        "  ROOT %f = bf16[16,64]{1,0} fusion(%a, %j), kind=kLoop, calls=%take", TAKE, (TAKEN + J_BYTES) + TAKEN, 1,
    ),
    # What is there is read, to be added to.
    "a scatter in place": (
        "  %v = bf16[16,64]{1,0} custom-call(), custom_call_target=\"AllocateBuffer\"\n"
        "  ROOT %f = bf16[512,64]{1,0} fusion(%a, %j, %v), kind=kInput, calls=%put", PUT,
        (TAKEN + J_BYTES + TAKEN) + TAKEN, 1,
    ),
    "softmax with a slice of a bias": (
        "  ROOT %f = bf16[32,64]{1,0} fusion(%x, %a), kind=kCustom, calls=%softmax", SOFTMAX,
        (X_BYTES + X_BYTES) + X_BYTES, 1,
    ),
    "a reduction with two results, and what it reduces": (
        "  ROOT %f = ((f32[8,64]{1,0}, f32[8,64]{1,0}), f32[8,64,64]{2,1,0}) fusion(%a), kind=kInput, calls=%sums",
        REDUCE,
        WHOLE + (2 * 8 * 64 * 4 + 2 * WHOLE), 1,
    ),
    # The start names its operand beside its result.
    "a copy in two parts": (
        "  %s = (bf16[8,64,64]{2,1,0}, bf16[8,64,64]{2,1,0}, u32[]) copy-start(%a)\n"
        "  ROOT %d = bf16[8,64,64]{2,1,0} copy-done(%s)", "", WHOLE + WHOLE, 1,
    ),
    "a copy to on-chip memory in two parts": (
        "  %s = (bf16[8,64,64]{2,1,0:S(1)}, bf16[8,64,64]{2,1,0}, u32[]{:S(2)}) copy-start(%a)\n"
        "  ROOT %d = bf16[8,64,64]{2,1,0:S(1)} copy-done(%s)",
        "",
        WHOLE,
        1,
    ),
    "a slice in two parts": (
        "  %s = ((bf16[8,64,64]{2,1,0}, s32[]), bf16[1,64,64]{2,1,0}, u32[]) dynamic-slice-start(%a, %i)\n"
        "  ROOT %d = bf16[1,64,64]{2,1,0} dynamic-slice-done(%s)", "", SLICE + SLICE, 1,
    ),
    "a computation in two parts": (
        "  %s = ((bf16[8,64,64]{2,1,0}), bf16[8,64,64]{2,1,0}, u32[]) async-start(%a), calls=%copied\n"
        "  ROOT %d = bf16[8,64,64]{2,1,0} async-done(%s), calls=%copied", ASYNC, WHOLE + WHOLE, 1,
    ),
    # Each operand once, however often it is named; all results, the workspace among them.
    "a kernel of cuDNN": (
        f"  ROOT %c = (bf16[32,64]{{1,0}}, f32[32]{{0}}, u8[1024]{{0}}) {CUDNN}", "",
        (X_BYTES + WHOLE + 4) + (X_BYTES + 32 * 4 + 1024), 1,
    ),
    "what is not a kernel": (
        "  %v = bf16[512,64]{1,0} bitcast(%a)\n  %e = pred[32,0]{1,0} copy(%x)\n"
        "  %t = (bf16[512,64]{1,0}, s32[]) tuple(%v, %i)\n  ROOT %g = s32[] get-tuple-element(%t), index=1", "", 0, 0,
    ),
    "on-chip memory": (
        "  ROOT %c = bf16[8,64,64]{2,1,0:T(8,128)(2,1)S(1)} copy(%a)", "", WHOLE, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_kernel(case):
    lines, computations, size, kernels = CASES[case]
    traffic = count(program(lines, computations))
    assert (traffic.memory, traffic.kernels) == (size, kernels)


def test_the_largest_array_is_not_one_that_is_updated_in_place():
    lines, computations, _, _ = CASES["the same slice twice"]
    largest = count(program(lines, computations)).largest
    assert (largest.bytes, largest.shape) == (SLICE, "bf16[64,64]")
    lines, computations, _, _ = CASES["several results, one in place"]
    lines += ', metadata={op_name="jit(f)/negate"}'
    largest = count(program(lines, computations)).largest
    assert (largest.bytes, largest.shape, largest.source) == (WHOLE, STACK, "jit(f)/negate")
    assert count(program(CASES["what is not a kernel"][0])).largest is None


EXCHANGES = """\
HloModule f

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%joined (p: f32[64,16], q: f32[8]) -> (f32[8,16], f32[64]) {
  %p = f32[64,16]{1,0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %scattered = f32[8,16]{1,0} reduce-scatter(%p), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%sum
  %gathered = f32[64]{0} all-gather(%q), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %t = (f32[8,16]{1,0}, f32[64]{0}) tuple(%scattered, %gathered)
}

ENTRY %main (x: f32[64,16], y: f32[8], z: bf16[4,4]) -> f32[8,16] {
  %x = f32[64,16]{1,0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %z = bf16[4,4]{1,0} parameter(2)
  %g = ((f32[8]{0}, bf16[4,4]{1,0}), (f32[64]{0}, bf16[32,4]{1,0})) all-gather-start(%y, %z), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}
  %gd = (f32[64]{0}, bf16[32,4]{1,0}) all-gather-done(%g)
  %s = ((f32[64,16]{1,0}), f32[8,16]{1,0}) reduce-scatter-start(%x), channel_id=4, replica_groups=[1,8]<=[8], to_apply=%sum
  %sd = f32[8,16]{1,0} reduce-scatter-done(%s)
  %a = ((f32[64,16]{1,0}), f32[64,16]{1,0}) all-to-all-start(%x), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}
  %ad = f32[64,16]{1,0} all-to-all-done(%a)
  %r = f32[8]{0} all-reduce-start(%y), channel_id=6, replica_groups=[1,8]<=[8], to_apply=%sum
  %rd = f32[8]{0} all-reduce-done(%r)
  %w = ((f32[64,16]{1,0}, f32[8]{0}), (f32[8,16]{1,0}, f32[64]{0}), u32[]) async-start(%x, %y), calls=%joined
  ROOT %wd = (f32[8,16]{1,0}, f32[64]{0}) async-done(%w), calls=%joined
}
"""  # noqa: E501


def test_joined_exchanges_count_once():
    """Those of several operands, and those of a computation that runs asynchronously: by their results alone."""
    traffic = read_traffic(EXCHANGES, devices=8)
    gathers, scatters = [(64 * 4 + 32 * 4 * 2) * 7 / 8, 64 * 4 * 7 / 8], [64 * 16 * 4 * 7 / 8] * 2
    by_kind = {}
    for c in traffic.collectives:
        by_kind.setdefault(c.kind, []).append(c.moved)
    assert by_kind == {
        "all-gather": gathers,
        "reduce-scatter": scatters,
        "all-to-all": [64 * 16 * 4 * 7 / 8],
        "all-reduce": [2 * 8 * 4 * 7 / 8],
    }
    assert traffic.kernels == 6
    # Read and written on the device: operands, and results.
    x, part, y, whole_y, z = 64 * 16 * 4, 8 * 16 * 4, 8 * 4, 64 * 4, 4 * 4 * 2
    assert traffic.memory == (y + z + whole_y + 8 * z) + (x + part) + 2 * x + 2 * y + (x + part) + (y + whole_y)
