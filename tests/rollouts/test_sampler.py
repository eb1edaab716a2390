"""Drawing against brute force, and the decode loop against whole forward passes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles import objective as oracle
from tiny import BUCKETS, CONFIG, IMAGE, MODEL, ROLES, pack, row

from vigos_jax.method.packing import pack_prompts
from vigos_jax.method.rows import Rollout, Row
from vigos_jax.method.spans import Spans
from vigos_jax.models.vlm import VisionLanguageModel
from vigos_jax.rollouts.sampler import Sampler, completions, row_keys
from vigos_jax.rollouts.sampling import Sampling, draw, penalise, top_k
from vigos_jax.runtime.sharding import batch_sharding, make_mesh, tree_shardings

# Drawing one token.

V = 12
LOGITS = np.array([2.0, 1.7, 1.2, 1.2, 0.9, 0.3, 0.0, -0.4, -1.0, -1.5, -3.0, -6.0], np.float32)[
    np.random.default_rng(0).permutation(V)
]


def allowed(logits, sampling):
    """Probabilities of the tokens that may be drawn, by sorting and adding up."""
    x = logits.astype(np.float64) / sampling.temperature
    p = np.exp(x) / np.exp(x).sum()
    keep = sorted(range(len(p)), key=lambda i: -p[i])
    if sampling.top_k:
        keep = keep[: sampling.top_k]
    mass, total, nucleus = 0.0, p[keep].sum(), []
    for i in keep:  # the fewest tokens with at least top_p of what is left
        if mass < sampling.top_p * total:
            nucleus.append(i)
        mass += p[i]
    nucleus = [i for i in nucleus if p[i] >= sampling.min_p * p.max()]
    out = np.zeros(len(p))
    out[nucleus] = p[nucleus] / p[nucleus].sum()
    return out


@functools.partial(jax.jit, static_argnums=(1, 2))
def many(logits, sampling, n):
    keys = jax.random.split(jax.random.key(0), n)
    return draw(keys, jnp.broadcast_to(logits, (n, logits.shape[-1])), sampling)


@pytest.mark.parametrize(
    "settings, support",
    [
        ({}, 12),
        ({"temperature": 1.7}, 12),
        ({"temperature": 0.5}, 12),
        ({"top_k": 1}, 1),
        ({"top_k": 5}, 5),
        ({"top_k": 500}, 12),
        ({"top_p": 0.5}, 2),
        ({"top_p": 0.9}, 6),
        ({"top_p": 1e-6}, 1),
        ({"min_p": 0.25}, 5),
        ({"min_p": 1.0}, 1),
        ({"temperature": 2.0, "top_k": 8, "top_p": 0.8}, 6),  # top-p of what top-k left
        ({"temperature": 2.0, "top_p": 0.95, "min_p": 0.3}, 8),  # both see the temperature
        ({"temperature": 1.1, "top_k": 9, "top_p": 0.97, "min_p": 0.1}, 8),
    ],
)
def test_draw(settings, support):
    n = 20_000
    sampling = Sampling(max_tokens=1, **settings)
    p = allowed(LOGITS, sampling)
    assert (p > 0).sum() == support
    tokens = many(LOGITS, sampling, n)
    assert tokens.dtype == jnp.int32
    counts = np.bincount(tokens, minlength=V)
    likely = p * n > 30
    assert (counts[p == 0] == 0).all() and (counts[likely] > 0).all()
    chi_square = np.sum((counts[likely] - n * p[likely]) ** 2 / (n * p[likely]))
    assert chi_square < support + 5 * np.sqrt(2 * support)


def test_the_frequencies_can_fail():
    n = 20_000
    counts = np.bincount(many(LOGITS, Sampling(max_tokens=1, temperature=1.1), n), minlength=V)
    p = allowed(LOGITS, Sampling(max_tokens=1))
    assert np.sum((counts - n * p) ** 2 / (n * p)) > 12 + 5 * np.sqrt(24)


def test_greedy():
    logits = jnp.stack([jnp.roll(LOGITS, i) for i in range(V)])
    tokens = draw(jax.random.split(jax.random.key(0), V), logits, Sampling(max_tokens=1, temperature=0.0, top_k=3))
    assert list(tokens) == list(np.argmax(logits, -1))


def test_each_row_draws_with_its_own_key():
    keys = row_keys(7, 3, 64)
    sampling = Sampling(max_tokens=1, top_p=0.99)
    logits = jnp.broadcast_to(LOGITS, (64, V))
    tokens = draw(keys, logits, sampling)
    assert len(set(tokens.tolist())) > 4
    np.testing.assert_array_equal(draw(keys[::-1], logits, sampling), tokens[::-1])
    np.testing.assert_array_equal(draw(row_keys(7, 3, 10, first_row=20), logits[:10], sampling), tokens[20:30])
    for other in (row_keys(8, 3, 64), row_keys(7, 4, 64)):
        assert (draw(other, logits, sampling) != tokens).any()


def penalised(logits, prompt, completion, sampling):
    """One row, one token at a time."""
    out = np.array(logits, np.float64)
    for i in set(prompt) | set(completion):
        out[i] = out[i] / sampling.repetition_penalty if out[i] > 0 else out[i] * sampling.repetition_penalty
    for i in set(completion):
        out[i] -= sampling.presence_penalty
    return out


@pytest.mark.parametrize("repetition, presence", [(1.3, 0.0), (0.7, 0.0), (1.0, 0.8), (1.0, -0.5), (1.5, 0.8)])
def test_penalties(repetition, presence):
    sampling = Sampling(max_tokens=1, repetition_penalty=repetition, presence_penalty=presence)
    rng = np.random.default_rng(0)
    prompt, completion = (rng.random((4, V)) < 0.4 for _ in range(2))
    logits = np.stack([np.roll(LOGITS, i) for i in range(4)])
    got = penalise(logits, prompt, completion, sampling)
    for i in range(4):
        want = penalised(logits[i], np.flatnonzero(prompt[i]), np.flatnonzero(completion[i]), sampling)
        np.testing.assert_allclose(got[i], want, atol=1e-6)
    assert not np.allclose(got, logits)


# The loop.

ROWS = (
    row(0, (4, 6)),
    row(1, (4, 4)),
    row(2),  # no picture
    Row(),  # a bad row
    row(4, (4, 4), (2, 6)),
    row(5, (6, 6)),
    row(6, (4, 2)),
    row(7, (6, 4)),
)
ACTIVE = [i for i, r in enumerate(ROWS) if r.student]
N = 16
NEVER = (CONFIG.vocab_size,)  # an end token that no row can draw
SAMPLING = Sampling(max_tokens=N, temperature=1.1, top_k=40, top_p=0.95)


def student(lora=None):
    base, trained = tiny.weights()
    return {"params": base, "lora": trained if lora is None else lora}


@functools.cache
def sampler(sampling=SAMPLING, eos_ids=NEVER, model=MODEL, cache_sizes=()):
    return Sampler(model, sampling, eos_ids=eos_ids, cache_sizes=cache_sizes)


def weights():
    return sampler().weights(student())


def prompts(rows=ROWS, buckets=BUCKETS):
    return pack_prompts(rows, config=CONFIG, buckets=buckets)


@functools.cache
def rollouts(seed=0):
    return sampler()(student(), prompts(), row_keys(seed, 0, len(ROWS)))


def forward(variables, r, ids):
    """Float64 log-probabilities [len(ids), V] by one forward pass over prompt and completion."""
    n = len(r.student.ids)
    out = oracle.logits(MODEL, variables, r.images, r.student.ids + tuple(ids))
    return oracle.log_softmax(out)[n - 1 : n - 1 + len(ids)]


def test_logps_are_those_of_a_whole_forward_pass():
    out = rollouts()
    for i in ACTIVE:
        assert len(out.ids[i]) == len(out.logps[i]) == N
        logp = forward(student(), ROWS[i], out.ids[i])
        np.testing.assert_allclose(out.logps[i], logp[np.arange(N), out.ids[i]], atol=1e-5)
        # each was among those that may be drawn
        assert all(allowed(x, SAMPLING)[t] > 0 for x, t in zip(logp, out.ids[i], strict=True))
    assert len({out.ids[i] for i in ACTIVE}) == len(ACTIVE)


def score(lora, out):
    """(student_logp of the sampled tokens by the scorer, sampler's logps), flat."""
    spans = Spans(False, (0, 0), (0, 0), (0, 0), "no_box")
    mix = [
        (r, Rollout(ids, spans, logps) if r.student else None)
        for r, ids, logps in zip(ROWS, out.ids, out.logps, strict=True)
    ]
    batch = pack(mix)
    used = batch.supervised.role >= 0
    assert used.sum() == sum(len(x) for x in out.ids)
    scores = tiny.scorer()(tiny.weights()[0], {"lora": lora}, batch)
    return np.asarray(scores.student_logp)[used], batch.supervised.sampled_logp[used]


def test_logps_are_the_scorers():
    by_scorer, by_sampler = score(tiny.weights()[1], rollouts())
    np.testing.assert_allclose(by_sampler, by_scorer, atol=1e-5)
    assert ROLES[2].scores == ("completion",)  # so that every token was compared


def test_after_a_tiny_step_the_sampler_is_the_student():
    """The first step of a run: B moves by the learning rate from zero, and the next rollouts must show it."""
    fresh = tiny.weights(adapter=0.0)[1]

    def step(path, x):
        return x + 5e-6 * jnp.sign(jnp.sin(jnp.arange(x.size)).reshape(x.shape)) if path[-1].key == "b" else x

    stepped = jax.tree_util.tree_map_with_path(step, fresh)
    out = sampler()(student(stepped), prompts(), row_keys(0, 0, len(ROWS)))
    by_student, by_sampler = score(stepped, out)
    by_base, _ = score(fresh, out)
    distance = np.abs(by_sampler - by_student).mean(), np.abs(by_sampler - by_base).mean()
    assert distance[0] < 0.1 * distance[1], distance


def test_a_seed_fixes_the_rollouts():
    again = sampler()(student(), prompts(), row_keys(0, 0, len(ROWS)))
    assert again == rollouts()
    other = rollouts(seed=1)
    assert all(other.ids[i] != again.ids[i] for i in ACTIVE)


def test_inactive_rows_give_no_tokens():
    out = rollouts()
    assert out.ids[3] == out.logps[3] == ()


def test_rows_do_not_depend_on_their_neighbours():
    neighbours = tuple(r if i % 2 else row(50 + i, (6, 6)) for i, r in enumerate(ROWS))
    out = sampler()(student(), prompts(neighbours), row_keys(0, 0, len(ROWS)))
    for i in (1, 5, 7):
        assert out.ids[i] == rollouts().ids[i]
        np.testing.assert_allclose(out.logps[i], rollouts().logps[i], atol=1e-5)
    assert out.ids[0] != rollouts().ids[0]


def test_rows_do_not_depend_on_padding():
    larger = dataclasses.replace(BUCKETS, prompt=(56,), patches=(96,))
    out = sampler()(student(), prompts(buckets=larger), row_keys(0, 0, len(ROWS)))
    assert out.ids == rollouts().ids
    for a, b in zip(out.logps, rollouts().logps, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_going_on_equals_one_call():
    s = sampler()
    state = s.start(student(), prompts(), row_keys(0, 0, len(ROWS)))
    for until in (1, 2, 7, 7, 3, N, N + 5):
        state = s.advance(weights(), state, until)
        out = completions(state)
        n = min(N, max(until, len(out.ids[0])))
        assert out.ids == tuple(ids[:n] for ids in rollouts().ids)
    assert state.step == N
    for a, b in zip(out.logps, rollouts().logps, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, capacities",
    [((1, 2, 3), (1, 2, N)), ((5,), (5, N)), ((N // 2, N), (N // 2, N)), ((N, 2 * N), (N,)), ((6, 3, 7), (3, 6, N))],
)
def test_a_cache_that_grows_changes_nothing(sizes, capacities):
    s = sampler(cache_sizes=sizes)
    assert s.capacities == capacities
    out = s(student(), prompts(), row_keys(0, 0, len(ROWS)))
    assert out.ids == rollouts().ids
    for a, b in zip(out.logps, rollouts().logps, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_the_cache_grows_only_when_it_is_full():
    """Also after a stop at the last free slot, and not for rows that have all stopped."""
    s = sampler(cache_sizes=(3, 6))
    slots = prompts().text.ids.shape[1]
    state = s.start(student(), prompts(), row_keys(0, 0, len(ROWS)))
    for until, capacity in ((1, 3), (3, 3), (4, 6), (6, 6), (N, N)):
        state = s.advance(weights(), state, until)
        assert state.step == until and state.visible.shape[1] == state.cache.layers[0].slots == slots + capacity
    stopped = sampler(cache_sizes=(3, 6), eos_ids=range(CONFIG.vocab_size))
    state = stopped.advance(weights(), stopped.start(student(), prompts(), row_keys(0, 0, len(ROWS))), N)
    assert state.step == 1 and state.visible.shape[1] == slots + 3


def test_a_grown_cache_that_loses_its_prompt_would_show():
    s = sampler(cache_sizes=(3, 6))
    state = s.advance(weights(), s.start(student(), prompts(), row_keys(0, 0, len(ROWS))), 3)
    blind = state.replace(visible=state.visible.at[:, : state.prompt_slots].set(False))
    assert completions(s.advance(weights(), blind, N)).ids != rollouts().ids


def test_images_that_are_encoded_already_are_taken():
    s = sampler()
    images = s.encode(student(), prompts())
    keys = row_keys(0, 0, len(ROWS))
    assert s(student(), prompts(), keys, images) == rollouts()
    assert s(student(), prompts(), keys, 0 * images) != rollouts()


@pytest.mark.parametrize("v, k", [(151_936, 20), (5121, 20), (5120, 20), (1000, 3), (130, 1), (129, 200), (7, 7)])
@pytest.mark.parametrize("values", ["distinct", "few", "one", "masked"])
def test_top_k_is_that_of_lax(v, k, values):
    """Ties: which of several equal elements is taken, and in which order."""
    rng = np.random.default_rng(0)
    x = {
        "distinct": rng.standard_normal((3, v)),
        "few": rng.integers(0, 4, (3, v)),
        "one": np.zeros((3, v)),
        "masked": np.where(rng.random((3, v)) < 0.99, -np.inf, rng.standard_normal((3, v))),
    }[values].astype(np.float32)
    k = min(k, v)
    for got, want in zip(top_k(jnp.asarray(x), k), jax.lax.top_k(x, k), strict=True):
        np.testing.assert_array_equal(got, want)


def test_an_end_token_stops_its_row():
    """Ends are chosen among the tokens that are sampled without any: every row must stop at its first."""
    free = rollouts()
    ends = tuple(sorted({free.ids[i][2 + k] for k, i in enumerate(ACTIVE)}))
    s = sampler(eos_ids=ends)
    state = s.advance(weights(), s.start(student(), prompts(), row_keys(0, 0, len(ROWS))), N)
    out = completions(state)
    for i in ACTIVE:
        n = 1 + min(j for j, t in enumerate(free.ids[i]) if t in ends)
        assert out.ids[i] == free.ids[i][:n] and out.ids[i][-1] in ends
        np.testing.assert_allclose(out.logps[i], free.logps[i][:n], atol=1e-5)
    assert out.ids[3] == ()
    longest = max(len(ids) for ids in out.ids)
    assert 1 < longest < N and len({len(out.ids[i]) for i in ACTIVE}) > 2
    assert state.step == longest and bool(state.is_done.all())  # the loop did not run on
    tokens = np.asarray(state.tokens)
    assert all((tokens[i, len(ids) :] == 0).all() for i, ids in enumerate(out.ids))


def test_a_batch_of_bad_rows_takes_no_step():
    s = sampler()
    bad = prompts((Row(),) * len(ROWS))
    state = s.advance(weights(), s.start(student(), bad, row_keys(0, 0, len(ROWS))), N)
    assert state.step == 0 and completions(state).ids == ((),) * len(ROWS)


def test_greedy_with_both_penalties_over_prompt_and_completion():
    sampling = Sampling(max_tokens=N, temperature=0.0, repetition_penalty=1.7, presence_penalty=2.0)
    out = sampler(sampling)(student(), prompts(), row_keys(0, 0, len(ROWS)))
    changed = 0
    for i in ACTIVE:
        prompt = ROWS[i].student.ids
        n = len(prompt)
        logits = np.asarray(oracle.logits(MODEL, student(), ROWS[i].images, prompt + out.ids[i]))
        for j, token in enumerate(out.ids[i]):
            x = logits[n - 1 + j]
            assert token == np.argmax(penalised(x, prompt, out.ids[i][:j], sampling))
            # each set counts: the rule without it draws another token somewhere
            changed += token != np.argmax(penalised(x, (), out.ids[i][:j], sampling))
            changed += 1000 * (token != np.argmax(penalised(x, prompt, (), sampling)))
        logp = oracle.log_softmax(logits)[n - 1 : n - 1 + N]
        np.testing.assert_allclose(out.logps[i], logp[np.arange(N), out.ids[i]], atol=1e-5)  # without penalties
    assert changed % 1000 > 0 and changed // 1000 > 0


def test_a_sampled_image_token_is_a_token_like_any_other():
    """Decoded as text, and scored as text."""
    base, lora = tiny.weights()
    often = np.bincount([t for ids in rollouts().ids for t in ids[: N // 2]]).argmax()
    order = np.arange(CONFIG.vocab_size)
    order[[often, IMAGE]] = IMAGE, often  # where that token was sampled, now the image token is
    variables = {"params": base | {"lm_head": base["lm_head"][:, order]}, "lora": lora}
    out = sampler()(variables, prompts(), row_keys(0, 0, len(ROWS)))
    assert sum(IMAGE in ids[:-1] for ids in out.ids) >= 2
    for i in ACTIVE:
        logp = forward(variables, ROWS[i], out.ids[i])
        np.testing.assert_allclose(out.logps[i], logp[np.arange(N), out.ids[i]], atol=1e-5)


@pytest.mark.slow
def test_float32_master_weights_decode_in_the_models_type():
    """Full fine-tuning's weights are cast once, and the result is that of weights of the model's own type."""
    model = VisionLanguageModel(CONFIG, dtype=jnp.bfloat16)
    s = sampler(dataclasses.replace(SAMPLING, max_tokens=4), model=model)
    base = tiny.weights()[0]
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    a, b = (s({"params": p}, prompts(), row_keys(0, 0, len(ROWS))) for p in (base, half))
    assert a == b and len(a.ids[0]) == 4


@pytest.mark.slow
def test_a_mesh_gives_the_same_tokens():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    variables = jax.device_put(student(), tree_shardings(student(), mesh, tiny.RULES))
    by_row = batch_sharding(mesh)
    out = sampler()(variables, jax.device_put(prompts(), by_row), jax.device_put(row_keys(0, 0, len(ROWS)), by_row))
    assert out.ids == rollouts().ids
    for a, b in zip(out.logps, rollouts().logps, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
