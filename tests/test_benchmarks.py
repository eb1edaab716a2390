"""The gates that need no clock: what the compiler says of the packed design, and how much padding is left."""

import dataclasses
import functools
import json
import subprocess
import sys

import compiled
import jax
import jax.numpy as jnp
import pytest
from cases import others_slow

from benchmarks import __main__ as command
from benchmarks import delta_rule, engines, gpu, heads, models, padding, teachers
from benchmarks.distillation_task import SMALL_SIZE
from benchmarks.harness import Result, copy_rate, product_rate, race

LONG = pytest.param(teachers.step, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def optimized(monkeypatch):
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=compiled.OPTIMIZED))


@pytest.mark.slow
@pytest.mark.parametrize(
    "benchmark", [teachers.teachers, LONG, heads.kl_memory, delta_rule.delta_rule_memory, padding.padding]
)
def test_gate_holds(benchmark):
    result = benchmark()
    assert result.gate and result.holds, result.line()


def test_a_gate_can_fail(monkeypatch, tmp_path, capsys):
    results = {
        "good": Result("good", "fast", 2.0, 1.5, (1.9, 2.1), (("floor", "1 s"),)),
        "bad": Result("bad", "slow", 1.4, 1.5),
        "free": Result("free", "no gate", None, None),
    }
    monkeypatch.setattr(command, "ALL", {name: lambda r=r: r for name, r in results.items()})
    for names, code in ((["good", "free"], 0), (["good", "bad"], 1)):
        monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", *names, "--json", str(tmp_path / "out.json")])
        assert command.main() == code
        rows = json.loads((tmp_path / "out.json").read_text())
        assert [row["name"] for row in rows] == names
        assert all({"name", "ratio", "gate", "holds", "spread"} <= row.keys() for row in rows)
    assert "FAILS bad" in capsys.readouterr().out


def test_rates_of_a_device_are_per_second():
    """Twice the size of a product takes eight times the operations: rates stay in one order of magnitude."""
    small, large = product_rate(256, jnp.float32), product_rate(512, jnp.float32)
    assert 0.1 < large / small < 20 and 1e8 < copy_rate(2**20) < 1e13


def test_a_race_takes_turns():
    calls = []
    r = race(lambda: calls.append("a"), lambda: calls.append("b"), rounds=3, warm_up=1)
    assert calls == ["a", "b"] * 4 and r.spread[0] <= r.spread[1] and r.ratio > 0


def test_the_readme_is_made_between_its_markers(tmp_path):
    from benchmarks.report import END, START, write_readme

    path = tmp_path / "README.md"
    path.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    write_readme(path, [Result("good", "fast", 2.0, 1.5, (1.9, 2.1), (("floor", "1 s"),))])
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| `good` | **2.00** | 1.90 - 2.10 | 1.5 | fast<br>floor: 1 s |" in text


def test_without_vllm_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(engines.vllm, "VENV", tmp_path)
    result = engines.engines()
    assert result.holds and result.ratio is None
    assert len(result.line().splitlines()) == 1 and "make vllm" in result.line()


def test_names_are_listed():
    done = subprocess.run([sys.executable, "-m", "benchmarks", "--only", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and "torch" in done.stderr


@pytest.fixture(scope="module")
def job():
    sizes = models.Sizes(grid=(8, 10), prompt=20, privileged=24, description=6, reasoning=10)
    config = dataclasses.replace(SMALL_SIZE, image_token_id=models.IMAGE, video_token_id=3)
    return gpu.Job(config, sizes, 8, 2, (1, 4), product=1e11, copy=1e10)


@pytest.mark.parametrize("name", others_slow(["causal", "branches", "images", "windows"]))
def test_attention_that_ignores_its_mask_is_not_timed_as_right(job, name, monkeypatch):
    assert gpu.attention_of(job, name).holds
    right, other = gpu.attention, gpu.masks(job)[name][1]

    def wrong(*qkv_and_mask, implementation):  # in 16 bits only, as a device's kernel
        *qkv, given = qkv_and_mask
        is_exact = qkv[0].dtype == jnp.float32
        return right(*qkv, given if is_exact else other, implementation=implementation)

    monkeypatch.setattr(gpu, "attention", wrong)
    result = gpu.attention_of(job, name)
    assert not result.holds and result.line().startswith("FAILS")


@pytest.mark.slow
def test_every_part_of_a_device_is_measured(job, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "make_job", lambda small: job)
    assert gpu.main(["--json", str(tmp_path / "out.json")]) == 0
    names = [row["name"] for row in json.loads((tmp_path / "out.json").read_text())]
    attention = [f"attention_{kind}" for kind in gpu.masks(job)]
    assert names == ["device", "step", *attention, "decode_1", "decode_4", "divergence"]
    assert "first step, with compilation" in capsys.readouterr().out
