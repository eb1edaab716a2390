"""The race against TRL: both sides do the same work. TRL itself is optional, its definition of the loss is not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import our_step, step_flops, torch_step, trl
from benchmarks.distillation_task import CONTROL, SCALES, make_task

ROWS, TOKENS = 4, 8
BFLOAT16 = dataclasses.replace(SCALES["small"], dtype=jnp.bfloat16)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("model"), scale=SCALES["small"], rows=ROWS, completion=TOKENS)


@pytest.fixture(scope="module")
def side(task):
    return our_step.OurStep(task)


@pytest.fixture(scope="module")
def sampled(side):
    return side.rollout()


@pytest.fixture(scope="module")
def completions(sampled):
    rows, rollouts, _ = sampled
    return {row.prompt.ids: r.ids for row, r in zip(rows, rollouts, strict=True)}


def plain_loss(task, rows, rollouts):
    """Mean over all tokens of KL(student || teacher), by transformers and peft, a row at a time."""
    base = torch_step.torch_base(task.config, task.variables, task.settings)
    model = torch_step.with_adapters(base, task.config, task.variables).eval()
    total = 0.0
    for row, rollout in zip(rows, rollouts, strict=True):
        ids = torch.tensor([row.prompt.ids + rollout.ids])
        inputs = {
            "input_ids": ids,
            "pixel_values": torch.tensor(row.images[0].patches),
            "image_grid_thw": torch.tensor([row.images[0].grid]),
            "mm_token_type_ids": (ids == CONTROL["image_token_id"]).int(),
        }
        at = slice(len(row.prompt.ids) - 1, -1)
        with torch.no_grad():
            student = model(**inputs).logits[0, at].log_softmax(-1)
            with model.disable_adapter():
                teacher = model(**inputs).logits[0, at].log_softmax(-1)
        total += float((student.exp() * (student - teacher)).sum())
    return total / sum(len(r.ids) for r in rollouts)


@pytest.mark.slow
def test_completions_have_their_full_length_and_no_control_token(sampled, completions):
    assert len(completions) == ROWS
    for ids in completions.values():
        assert len(ids) == TOKENS and not set(ids) & set(CONTROL.values())


@pytest.mark.slow
def test_loss_of_one_teacher_is_the_plain_one(task, side, sampled, completions):
    rows, rollouts, _ = sampled
    plain = plain_loss(task, rows, rollouts)
    assert plain > 1  # else a missing adapter would pass
    assert trl.compare(side, completions, plain)[0] == 1.0
    with pytest.raises(AssertionError, match="losses"):
        trl.compare(side, completions, 1.001 * plain)


def test_other_work_is_refused(side, completions):
    prompts, ids = list(completions), list(completions.values())
    with pytest.raises(AssertionError, match="prompts' ids"):
        trl.compare(side, {(*p, 3): c for p, c in completions.items()}, 0.0)
    with pytest.raises(AssertionError, match="greedy tokens"):
        trl.compare(side, dict(zip(prompts, ids[1:] + ids[:1], strict=True)), 0.0)
    with pytest.raises(AssertionError, match="have"):
        trl.compare(side, {p: c[:-1] for p, c in completions.items()}, 0.0)


def test_our_step_trains_the_adapters(task, sampled):
    side = our_step.OurStep(task)
    assert side.update(*sampled) > 0
    before, after = task.variables["lora"], side._state.trained["lora"]
    assert all(float(np.abs(a - b).max()) > 0 for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))


def test_sizes_and_gates(task, sampled, monkeypatch):
    rows, _, _ = sampled
    theirs, ours = trl.step_shapes(task)
    assert theirs.prompt == len(rows[0].prompt.ids) and theirs.patches == 80 and theirs.encodings == 2
    # Perception reads and scores three tokens; reasoning reads all but the last of eight, which it does not run.
    prefix, (_, perception), (_, reasoning) = ours.teachers
    turns = rows[0].teachers
    assert prefix == (0, len(rows[0].prompt.prefix_ids)) and ours.encodings == 0
    assert (perception, reasoning) == (len(turns[0].rest_ids) + 2, len(turns[1].rest_ids) + TOKENS - 1)
    assert ours.supervised == TOKENS
    measured = trl.Measured([(4.0, 2.0), (5.0, 2.0), (6.0, 2.0)], [(2.0, 2.0)] * 3, 1.0, (0.5, 0.5), product_rate=1e9)
    monkeypatch.setattr(trl, "version", lambda name: "1.2")
    results = {r.name: r for r in trl.results(task, measured)}
    assert [(r.ratio, r.gate) for r in results.values()] == [(2.5, 1.1), (1.0, None), (1.75, 1.1)]
    counted = step_flops.phases(task.config, 64, ours)
    rollout = len(task.images) * sum(counted[phase] for phase in ("encode", "prefill", "decode"))
    detail = dict(results["trl_rollout"].detail)
    assert detail["ours"] == f"2.00 s, {rollout / 2 / 1e9:.0f} GFLOP/s"
    assert detail["at most"].startswith(f"{5.0 / (rollout / 1e9):.2f},")
    assert results["trl_rollout"].holds and "trl 1.2" in results["trl_step"].line()


def test_flops_are_those_of_a_loop_over_tokens(task):
    config = task.config
    shape = step_flops.StepShape(80, 12, 5, 1, ((0, 4), (4, 3), (4, 6)), 9)
    counted = step_flops.phases(config, 8, shape)
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_layers
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = [(d, heads), (d, kv), (d, kv), (heads, d), (d, f), (d, f), (f, d)]
    dense = adapters = 0
    for a, b in sizes:
        dense += 2 * a * b
        adapters += 2 * 8 * (a + b)
    attention = lambda keys: 2 * 2 * heads * keys  # noqa: E731
    prefill = sum(layers * (dense + adapters + attention(i + 1)) for i in range(12)) + 2 * d * config.vocab_size
    decode = sum(layers * (dense + adapters + attention(i + 1)) + 2 * d * config.vocab_size for i in range(12, 17))
    teachers = sum(layers * (dense + attention(read + i + 1)) for read, new in shape.teachers for i in range(new))
    assert (counted["prefill"], counted["decode"], counted["teachers"]) == (prefill, decode, teachers)
    student = sum(layers * (2 * dense + 3 * (adapters + attention(i + 1))) for i in range(17))
    assert counted["student, backward"] == student and counted["heads"] == 3 * 9 * 2 * d * config.vocab_size
    assert counted["encode again"] == counted["encode"] > 0
    assert step_flops.branches([1, 1, 2, 3, 3, 3, 0, 0]) == ((0, 2), (2, 1), (2, 3))


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--rows", "0"], "--rows 0 must be at least 1"),
        (["--tokens", "7"], "--tokens 7 must be at least 8"),
        (["--rounds", "x"], "invalid int value: 'x'"),
        (["--scale", "small", "--readme", "README.md"], "leave out --scale small"),
        (["--scale", "7B"], "invalid choice: '7B'"),
    ],
)
def test_bad_arguments(argv, said, capsys):
    with pytest.raises(SystemExit) as e:
        trl.main(argv)
    assert e.value.code == 2 and said in capsys.readouterr().err


def test_without_trl_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(trl, "find_spec", lambda name: None)
    assert trl.main([]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "pip install -e '.[test,bench]'" in said[0] and "trl_step" in said[0]
    # Who runs all other gates is told of these.
    monkeypatch.setattr(command, "ALL", {})
    monkeypatch.setattr("sys.argv", ["benchmarks"])
    assert command.main() == 0 and capsys.readouterr().out.splitlines() == said


@pytest.mark.slow
def test_in_16_bits_the_losses_are_near(tmp_path):
    """As on a GPU: the base is drawn in bfloat16 and recomputed, and only the adapters are float32."""
    rough = make_task(tmp_path, scale=BFLOAT16, rows=2, completion=TOKENS)
    assert {x.dtype.name for x in jax.tree.leaves(rough.variables["params"])} == {"bfloat16"}
    side = our_step.OurStep(rough)
    rows, rollouts, _ = side.rollout()
    base = torch_step.torch_base(rough.config, rough.variables, rough.settings, dtype=np.dtype(jnp.bfloat16))
    assert {x.dtype for x in base.parameters()} == {torch.bfloat16}
    exact = dataclasses.replace(rough, variables=jax.tree.map(lambda x: x.astype(jnp.float32), rough.variables))
    plain = plain_loss(exact, rows, rollouts)
    completions = {row.prompt.ids: r.ids for row, r in zip(rows, rollouts, strict=True)}
    assert plain > 1 and trl.compare(side, completions, plain)[1][1] == pytest.approx(plain, rel=0.03)
    with pytest.raises(AssertionError, match="losses"):
        trl.compare(side, completions, 1.1 * plain)


@pytest.mark.skipif(trl.missing() is not None, reason=str(trl.missing()))
@pytest.mark.parametrize("scale", [SCALES["small"], BFLOAT16], ids=["float32", "bfloat16"])
def test_trl_does_the_same_work(scale, tmp_path):
    task = make_task(tmp_path, scale=scale, rows=2, completion=TOKENS)
    measured = trl.measure(task, rounds=1)  # which compares prompts, tokens and losses
    assert measured.equal == 1.0 or not scale.is_exact
    assert len(measured.rollout) == len(measured.update) == 1
    assert min(*measured.rollout[0], *measured.update[0], measured.product_rate) > 0
