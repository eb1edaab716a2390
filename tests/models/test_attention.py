"""Every kind of mask by every kernel against softmax written out, values and gradients, with its negative case."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh

from vigos_jax.errors import InputError
from vigos_jax.models import decoder
from vigos_jax.models import masked_attention as masked
from vigos_jax.models.attention import attention, by_cudnn, by_splash, choose, for_heads, over_mesh
from vigos_jax.models.attention_masks import Branches, Causal, Images, Windows
from vigos_jax.models.inputs import TextInputs
from vigos_jax.models.vlm import abstract_variables

B, T = 3, 128
LENGTHS = np.array([T, 77, 1], np.int32)


def _runs(*rows):
    """int32 [B, T]: each row's (number, count) one after the other, then zeros."""
    out = np.zeros((len(rows), T), np.int32)
    for row, runs in zip(out, rows, strict=True):
        numbers = np.concatenate([np.full(n, number) for number, n in runs])
        row[: len(numbers)] = numbers
    return out


# The second row's branches are one fewer, the third has none.
SEGMENTS = _runs([(1, 20), (2, 50), (3, 7), (4, 40)], [(1, 1), (2, 30), (3, 97)], [(1, 9)])
# Padding in front of branches, as layers with a state pack them.
GAPS = _runs([(1, 10), (0, 6), (2, 30), (0, 2), (3, 7), (0, 9), (4, 40)], [(1, 16), (2, 30), (0, 2), (3, 70)], [(1, 9)])
# Empty slots between images and inside one; numbers whose bits differ in one place and in several.
IMAGES = _runs([(1, 40), (0, 8), (2, 40), (3, 40)], [(7, 20), (0, 4), (7, 20), (8, 24), (0, 44), (9, 16)], [(1, 128)])
MASKS = {
    "causal": Causal(LENGTHS),
    "branches": Branches(SEGMENTS, most=3, has_gaps=False),
    "gaps": Branches(GAPS, most=3),
    "images": Images(IMAGES, most=9),
    "windows": Windows(IMAGES, most=9, window=16),
}
USED = {
    "causal": np.arange(T) < LENGTHS[:, None],
    "branches": SEGMENTS > 0,
    "gaps": GAPS > 0,
    "images": IMAGES > 0,
    "windows": IMAGES > 0,
}


def _oracle(kind):
    """bool [B, T, T], pair by pair."""
    mask = np.zeros((B, T, T), bool)
    window = np.arange(T) // 16
    for b in range(B):
        for q in range(T):
            for k in range(T):
                s, i = (GAPS if kind == "gaps" else SEGMENTS)[b], IMAGES[b]
                in_branch = k <= q and s[k] > 0 and s[k] in (1, s[q])
                mask[b, q, k] = {
                    "causal": k <= q and k < LENGTHS[b],
                    "branches": in_branch,
                    "gaps": in_branch,
                    "images": i[q] == i[k] and i[k] > 0,
                    "windows": i[q] == i[k] and i[k] > 0 and window[q] == window[k],
                }[kind]
    return mask


@functools.cache
def _arrays(s=T, heads=4, kv_heads=2, head_dim=16, rows=B):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    return draw(rows, T, heads, head_dim), draw(rows, s, kv_heads, head_dim), draw(rows, s, kv_heads, head_dim)


def _plain(q, k, v, mask):
    """Softmax attention as in a textbook."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[:, None], logits, -jnp.inf), -1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def _compare(ours, mask, arrays, used, *, tolerance=1e-4):
    """Values at the used queries, and the gradients of a sum over them that weighs each differently."""
    used = jnp.asarray(used)[:, :, None, None]
    weigh = jnp.asarray(np.random.default_rng(2).standard_normal(arrays[0].shape, np.float32))
    # Rows of the mask without a key would be NaN, and so would every gradient.
    plain = functools.partial(_plain, mask=jnp.asarray(mask) | ~used[:, :, 0])
    both = []
    for f in (ours, plain):
        loss = lambda *x, f=f: (lambda y: (jnp.sum(y * weigh), y))(jnp.where(used, f(*x), 0))  # noqa: E731
        (_, value), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
        both.append((value, *grads))
    for a, b in zip(*both, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


KERNELS = {
    "xla": attention,
    "cudnn": functools.partial(by_cudnn, implementation="xla"),
    "splash": functools.partial(by_splash, interpret=True),
}


@pytest.fixture(params=["xla", "xla in parts of rows", "xla in parts of queries", "cudnn", "splash"])
def kernel(request, monkeypatch):
    """A function (q, k, v, mask). cuDNN runs on a GPU alone: its question is answered by XLA, splash is interpreted."""
    name, *_ = request.param.split()
    if "rows" in request.param:
        monkeypatch.setattr(masked, "PART_BYTES", 2 * T * T * (4 * 16 + 1))  # 3 rows: parts of one
    if "queries" in request.param:
        monkeypatch.setattr(masked, "PART_BYTES", 50 * T * (4 * 16 + 1))  # 3 parts of 43, padded
    return KERNELS[name]


@pytest.mark.parametrize("kind", MASKS)
def test_a_description_is_its_mask(kind):
    want = _oracle(kind)
    np.testing.assert_array_equal(MASKS[kind].dense(T), want)
    part = np.array([3, 100, 127, 130])  # beyond the last query: any
    np.testing.assert_array_equal(MASKS[kind].of(part, T)[:, :3], want[:, part[:3]])


@pytest.mark.slow
@pytest.mark.parametrize("kind", MASKS)
def test_a_kernel_is_plain_attention(kind, kernel):
    _compare(lambda *x: kernel(*x, MASKS[kind]), _oracle(kind), _arrays(), USED[kind])


# What would go unnoticed: each mask lets a query attend to one kind of key more.
WRONG = {
    "padding is attended": ("causal", lambda: MASKS["causal"].replace(lengths=LENGTHS + np.int32([0, 1, 0])), 0),
    "a branch attends to its neighbour": ("branches", lambda: Branches(np.minimum(SEGMENTS, 3), most=3), 1e-2),
    "a gap is a neighbour": ("gaps", lambda: Branches(np.where(GAPS == 0, 2, GAPS), most=3), 1e-2),
    "an image attends to another": ("images", lambda: Images(np.where(IMAGES == 3, 2, IMAGES), most=9), 1e-2),
    "an empty slot is attended": ("images", lambda: Images(np.where(IMAGES == 0, 7, IMAGES), most=9), 1e-2),
    "a window is too wide": ("windows", lambda: MASKS["windows"].replace(window=32), 1e-2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_mask_differs(name, kernel):
    kind, wrong, _ = WRONG[name]
    used = USED[kind] | (np.arange(T) < LENGTHS[:, None] + 1 if kind == "causal" else False)
    right, other = (kernel(*_arrays(), m) for m in (MASKS[kind], wrong()))
    assert np.max(np.abs((right - other) * used[:, :, None, None])) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("kind", MASKS)
def test_what_means_nothing_is_finite(kind, kernel):
    """Rows of padding alone, forward and backward."""
    mask = jax.tree.map(np.zeros_like, MASKS[kind])
    loss = lambda *x: (lambda y: (jnp.sum(y), y))(kernel(*x, mask))  # noqa: E731
    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*_arrays())
    assert all(np.isfinite(x).all() for x in (out, *grads))


def _random_mask(s=T):
    mask = np.random.default_rng(1).random((B, T, s)) < 0.3
    mask[:, :, 0] = True
    return jnp.asarray(mask)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 50 * 96 * (4 * 16 + 1)])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_dense_mask(kv_heads, limit, monkeypatch):
    if limit:
        monkeypatch.setattr(masked, "PART_BYTES", limit)
    mask = _random_mask(96)
    arrays = _arrays(s=96, kv_heads=kv_heads)
    _compare(lambda *x: attention(*x, mask, implementation="cudnn"), mask, arrays, np.ones((B, T), bool))
    other = mask.at[0, 5, 9].set(~mask[0, 5, 9])
    with pytest.raises(AssertionError):
        _compare(lambda *x: attention(*x, other), mask, arrays, np.ones((B, T), bool))


@pytest.mark.slow
@pytest.mark.parametrize("t", [200, 256])
def test_splash_takes_any_length(t):
    """Padded to whole blocks; of windows, whole blocks along the diagonal are computed and no others."""
    draw = lambda i: jnp.asarray(np.random.default_rng(i).standard_normal((1, t, 1, 16), np.float32))  # noqa: E731
    arrays, ids = [draw(i) for i in range(3)], np.repeat([1, 2], [150, t - 150])[None]
    for mask in (Windows(ids, most=2, window=8), Causal(np.array([t - 3]))):
        used = np.arange(t)[None] < t - 3
        out, want = (f(*arrays, m) for f, m in ((KERNELS["splash"], mask), (_plain, mask.dense(t))))
        np.testing.assert_allclose((out - want) * used[..., None, None], 0, atol=1e-4)


def test_branches_of_unknown_number_are_xlas():
    left = Branches(np.roll(SEGMENTS, 11, axis=1))  # padding on both sides
    used = left.segment_ids > 0
    _compare(lambda *x: attention(*x, left, implementation="splash"), left.dense(T), _arrays(), used)


def test_sixteen_bits():
    mask, arrays = _random_mask(), _arrays()
    short = [x.astype(jnp.bfloat16) for x in arrays]
    out = attention(*short, mask)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), _plain(*arrays, mask), atol=0.05)
    grads = jax.grad(lambda *x: jnp.sum(attention(*x, mask).astype(jnp.float32)), argnums=(0, 1, 2))(*short)
    assert {x.dtype for x in grads} == {jnp.dtype(jnp.bfloat16)}
    images = KERNELS["cudnn"](*short, MASKS["images"]).astype(jnp.float32)
    used = USED["images"][:, :, None, None]
    np.testing.assert_allclose(images * used, attention(*arrays, MASKS["images"]) * used, atol=0.05)


def test_no_part_is_larger_than_said(monkeypatch):
    """At every size, also over a mesh, where a device holds its own rows and heads."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    for b, t, s, n, over in [
        (32, 4096, 4096, 16, None), (32, 1344, 2304, 16, mesh), (1, 65536, 65536, 64, None), (6, 300, 300, 12, mesh),
    ]:  # fmt: skip
        parts = masked.parts_of(b, t, s, n, itemsize=2, mesh=over)
        shards, tensor = (4, 2) if over and b % 4 == 0 else (2, 2) if over else (1, 1)
        assert parts.shards == shards
        queries = b // shards // parts.rows * -(-t // parts.queries)
        assert queries * s * (n // tensor * 12 + 1) <= masked.PART_BYTES + s * n * 12  # a part has whole queries
        assert (b // shards) % parts.rows == 0


@pytest.mark.parametrize("name, axes, kind", [("xla", (1, 2, 4), "branches"), ("splash", (1, 2, 4), "images")])
def test_over_a_mesh(name, axes, kind, monkeypatch):
    """Rows and heads over devices; 4 shards do not divide 2 key/value heads. XLA takes parts of all devices' rows."""
    monkeypatch.setattr(masked, "PART_BYTES", T * T * (16 + 1))  # one row with the one head of a device
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(axes), ("data", "fsdp", "tensor"))
    more = lambda x: np.concatenate([x, x[:1]])  # noqa: E731
    mask, used = jax.tree.map(more, MASKS[kind]), more(USED[kind])
    run = functools.partial(over_mesh, KERNELS["splash"], mesh=mesh)
    if name == "xla":
        run = functools.partial(attention, mesh=mesh)
    _compare(lambda *x: run(*x, mask), more(_oracle(kind)), _arrays(rows=B + 1), used)


def test_prefill_attends_to_its_own_tokens(monkeypatch):
    """What is kept for the cache is returned beside it: the kernels want as many keys as queries."""
    asked = []
    spy = lambda q, k, v, mask, **rest: asked.append((q.shape[1], k.shape[1])) or attention(q, k, v, mask)  # noqa: E731
    monkeypatch.setattr(decoder, "attention", spy)
    numbers = lambda *shape: jax.ShapeDtypeStruct((2, *shape), jnp.int32)  # noqa: E731
    text = TextInputs(numbers(5), numbers(3, 5), numbers(5), numbers(5))
    variables, images = abstract_variables(tiny.MODEL), jnp.zeros((2, 0, tiny.CONFIG.hidden_size))

    def run(variables, text, keep):
        return tiny.MODEL.apply(variables, text, images, mask=Causal(np.full(2, 5)), keep=keep)[1]

    asked.clear()  # making the variables asks too
    kept = jax.eval_shape(functools.partial(run, keep=True), variables, text)
    assert set(asked) == {(5, 5)}
    assert kept.k.shape == (tiny.CONFIG.num_layers, 2, 5, tiny.CONFIG.num_kv_heads, tiny.CONFIG.head_dim)
    assert jax.eval_shape(functools.partial(run, keep=False), variables, text) is None


def test_what_cudnn_is_asked(monkeypatch):
    """Lengths or features, never a mask or a bias, which would be an array of [T, T]; heads as wide as it takes."""
    asked = []
    plain = jax.nn.dot_product_attention

    def spy(*arrays, implementation, **options):
        asked.append((implementation, arrays[0].shape[-1], options))
        return plain(*arrays, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    for mask in MASKS.values():
        attention(*_arrays(), mask, implementation="cudnn")
    assert {name for name, _, _ in asked} == {"cudnn"} and len(asked) == 1 + 3 + (1 + 3) + 1 + 1
    assert not any({"mask", "bias"} & options.keys() for _, _, options in asked)
    assert [width for _, width, _ in asked] == [16] * 8 + [24, 24]
    assert all(options["is_causal"] for _, _, options in asked[:8])
    asked.clear()
    attention(*_arrays(head_dim=120), Images(IMAGES, most=31), implementation="cudnn")
    attention(*_arrays(head_dim=256), MASKS["causal"], implementation="cudnn")
    attention(*_arrays(), _random_mask(), implementation="cudnn")
    assert asked == []  # XLA's


def test_chosen_by_platform():
    at = lambda platform, asked="auto", dtype="bfloat16", **card: choose(asked, platform=platform, dtype=dtype, **card)  # noqa: E731
    assert [at(p) for p in ("cpu", "gpu", "tpu")] == ["xla", "cudnn", "splash"]
    assert {at(p, dtype="float32") for p in ("cpu", "gpu", "tpu")} == {"xla"}
    assert [at("gpu", "xla"), at("gpu", "cudnn"), at("gpu", is_served=False)] == ["xla", "cudnn", "xla"]
    for platform, dtype in (("cpu", "bfloat16"), ("tpu", "bfloat16"), ("gpu", "float32")):
        with pytest.raises(InputError, match=f"attention='cudnn' does not run on {platform}.*choices: auto, xla"):
            at(platform, "cudnn", dtype)
    with pytest.raises(InputError, match="'cudnn' does not run on gpu before Ampere.*choices: auto, xla$"):
        at("gpu", "cudnn", is_served=False)
    widths = [for_heads("cudnn", 128), for_heads("cudnn", 256), for_heads("cudnn", 20), for_heads("splash", 256)]
    assert widths == ["cudnn", "xla", "xla", "splash"]


def test_a_gap_that_is_not_told_differs(kernel):
    """XLA reads the numbers alone; the others would take the first branch for the prefix's neighbour."""
    right, other = (kernel(*_arrays(), Branches(GAPS, most=3, has_gaps=told)) for told in (True, False))
    first = GAPS[:1] == 2
    differs = np.max(np.abs((right - other)[:1] * first[:, :, None, None])) > 1e-2
    assert differs == (kernel is not attention)
