"""The bucketed while-loop against a python loop over a cache of full length."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import models
from benchmarks.harness import Result, race
from vigos_jax.method.packing import pack_prompts
from vigos_jax.rollouts.sampler import Sampler, row_keys
from vigos_jax.rollouts.sampling import Sampling

ROWS, LONGEST, TOKENS = 16, 4096, 32  # the longest is the paper's; most rollouts are much shorter


def decode() -> Result:
    config = models.MID_SIZE
    rows, _ = models.samples(config, models.THIRD, rows=ROWS)
    prompts = pack_prompts(rows, config=config, buckets=models.exact_buckets(config))
    prompts = jax.tree.map(jnp.asarray, prompts)
    variables = models.weights(config)
    model, sampling = models.model(config), Sampling(max_tokens=LONGEST, temperature=1.1, top_k=20, top_p=0.95)
    keys = row_keys(0, 0, ROWS)

    ours = Sampler(model, sampling, eos_ids=(-1,), cache_sizes=(64, 128, 256, 512))
    full = Sampler(model, sampling, eos_ids=(-1,))

    # Prompts are run once; the loops get copies of what they leave, since they overwrite it.
    started = {sampler: jax.block_until_ready(sampler.start(variables, prompts, keys)) for sampler in (ours, full)}

    weights = ours.weights(variables)

    def copy_of(sampler: Sampler):
        return jax.tree.map(jnp.copy, started[sampler])

    def bucketed():
        return ours.advance(weights, copy_of(ours), TOKENS).tokens

    def python_loop():
        state = copy_of(full)
        for n in range(1, TOKENS + 1):
            state = full.advance(weights, state, n)
            if bool(jnp.all(state.is_done)):
                break
        return state.tokens

    # Sums over caches of other lengths round in other orders, and a near-tie may fall the other way in a row.
    same = np.mean(np.all(np.asarray(bucketed())[:, :TOKENS] == np.asarray(python_loop())[:, :TOKENS], 1))
    assert same >= 0.75, same
    r = race(python_loop, bucketed)
    read = sum(x.nbytes for x in jax.tree.leaves(variables["params"]["layers"]))
    read += variables["params"]["embedding"].nbytes
    detail = (
        ("python loop, full cache", f"{r.baseline:.2f} s"),
        ("bucketed loop", f"{r.ours:.2f} s for {ROWS} x {TOKENS} tokens, {same:.0%} of the rows equal"),
        ("bytes a token step must read", f"{read / 2**20:.0f} MiB of weights"),
    )
    return Result("decode", f"100 M parameters, {TOKENS} of at most {LONGEST} tokens", r.ratio, 2.0, r.spread, detail)
