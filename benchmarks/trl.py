"""Whole optimizer steps against TRL's own DistillationTrainer, in turn, in one process; see benchmarks/README.md.

    python -m benchmarks.trl [--rows N] [--tokens N] [--rounds N] [--scale SCALE] [--json FILE] [--readme FILE]

`--scale 100M`, in float32, is what a CPU does in minutes; 3B, in bfloat16, is meant for a GPU; it
has not finished on one yet.
Needs `pip install -e '.[test,bench]'`. Exits 1 when a gate fails, 2 without TRL.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np

from benchmarks import models, our_step, step_flops
from benchmarks.distillation_task import SCALES, Task, make_task
from benchmarks.harness import Race, Result, product_rate, race_of
from benchmarks.report import start, write_readme
from vigos_jax.method.packing import pack_scores

# Both sides are products of nearly the same size on one machine; what a ratio could reach at most is in each row.
GATES = {"trl_rollout": 1.1, "trl_step": 1.1}
COMMAND = "python -m benchmarks.trl"
INSTALL = "pip install -e '.[test,bench]'"


def missing() -> str | None:
    """One line that says what to install, or None where TRL is installed."""
    if find_spec("trl"):
        return None
    return f"{COMMAND} (gates {', '.join(GATES)}) needs TRL: {INSTALL}"


def note() -> str:
    """One line for whoever runs the other gates."""
    return missing() or f"{', '.join(GATES)} are measured apart: {COMMAND}"


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of each round, (TRL's, ours), and what was compared before the first.

    Attributes:
      equal: share of the greedy tokens in front of a row's first difference.
      losses: of the same completions, TRL's and ours by its definition.
      product_rate: FLOP/s of a plain product, the median of one a round.
    """

    rollout: list[tuple[float, float]]
    update: list[tuple[float, float]]
    equal: float
    losses: tuple[float, float]
    product_rate: float


def measure(task: Task, *, rounds: int) -> Measured:
    """Runs both sides in turn; the first round compiles, is compared, and is not timed."""
    from benchmarks.trl_step import make_trainer

    ours = our_step.OurStep(task)
    rollout, update, compared, rates = [], [], [], []

    def our_turn(trainer, seconds: float) -> None:
        if not compared:
            compared.append(compare(ours, trainer.last_completions(), trainer.last_loss()))
        begin = time.perf_counter()
        sampled = ours.rollout()
        middle = time.perf_counter()
        ours.update(*sampled)
        end = time.perf_counter()
        rollout.append((trainer.rollout_seconds, middle - begin))
        update.append((seconds - trainer.rollout_seconds, end - middle))
        rates.append(product_rate(2048 if task.scale.is_exact else 8192, task.scale.dtype))

    with tempfile.TemporaryDirectory() as folder:
        make_trainer(task, folder, steps=1 + rounds, after_step=our_turn).train()
    return Measured(rollout[1:], update[1:], *compared[0], statistics.median(rates[1:]))


def compare(ours: our_step.OurStep, theirs: dict, loss: float) -> tuple[float, tuple[float, float]]:
    """Raises AssertionError unless both sides did the same work with the same weights.

    Args:
      theirs: prompt -> completion of TRL's first step; loss: its loss.

    Returns:
      `Measured.equal` and `Measured.losses`.
    """
    rows, rollouts, _ = ours.rollout()
    prompts = [row.prompt.ids for row in rows]
    assert set(prompts) == set(theirs), "the prompts' ids differ"
    completions = [theirs[prompt] for prompt in prompts]
    lengths = {len(c) for c in (*completions, *(r.ids for r in rollouts))}
    assert lengths == {ours.task.completion}, f"completions have {lengths} tokens"
    same = [np.cumprod(np.equal(c, r.ids)).mean() for c, r in zip(completions, rollouts, strict=True)]
    # Sums in other orders: a near-tie may fall the other way, in 16 bits every few tokens.
    least, tolerance = (0.75, 1e-4) if ours.task.scale.is_exact else (0.0, 0.03)
    assert np.mean(same) >= least, f"greedy tokens are equal in {np.mean(same):.0%}"
    mine = ours.loss_of_one_teacher(completions)
    assert abs(mine - loss) < tolerance * max(1.0, abs(loss)), f"losses of the same completions: {loss} and {mine}"
    return float(np.mean(same)), (loss, mine)


def results(task: Task, measured: Measured) -> list[Result]:
    """Rollout, update and whole step; the gates are of the sizes that the README names."""
    whole = [(a + c, b + d) for (a, b), (c, d) in zip(measured.rollout, measured.update, strict=True)]
    theirs, mine = step_shapes(task)
    counted = [step_flops.phases(task.config, models.LORA.rank, shape) for shape in (theirs, mine)]

    def speed(race: Race, phases: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """Seconds and FLOP/s of both, and the ratio if ours were nothing but plain products."""
        a, b = (len(task.images) * sum(c[phase] for phase in phases) for c in counted)
        return (
            ("TRL", f"{race.baseline:.2f} s, {_rate(a / race.baseline)}"),
            ("ours", f"{race.ours:.2f} s, {_rate(b / race.ours)}"),
            (
                "at most",
                f"{race.baseline * measured.product_rate / b:.2f}, if ours ran at the "
                f"{_rate(measured.product_rate)} of a plain product",
            ),
        )

    r, ratio = race_of(whole), sum(counted[0].values()) / sum(counted[1].values())
    versions = ", ".join(f"{x} {version(x)}" for x in ("trl", "transformers", "torch", "peft"))
    loss, ours = measured.losses
    detail = (
        *speed(r, tuple(counted[0])),
        ("FLOPs, TRL / ours", f"{ratio:.2f}"),
        ("FLOPs of TRL's step", step_flops.shares(counted[0])),
        ("FLOPs of ours", step_flops.shares(counted[1])),
        (
            "compared",
            f"prompts, greedy tokens ({measured.equal:.0%} of them before the first difference of a row), "
            f"loss {loss:.6f} and {ours:.6f}",
        ),
        ("versions", versions),
    )
    what = (
        f"a whole step, {len(task.images)} rows of {theirs.prompt} tokens, {task.completion} sampled; "
        "TRL has one teacher, ours three"
    )
    update = tuple(phase for phase in counted[0] if phase not in step_flops.ROLLOUT)
    out = []
    for name, words, times, phases in (
        ("trl_rollout", "its rollout", measured.rollout, step_flops.ROLLOUT),
        ("trl_update", "its update", measured.update, update),
    ):
        part = race_of(times)
        out.append(Result(name, words, part.ratio, GATES.get(name), part.spread, speed(part, phases)))
    return [*out, Result("trl_step", what, r.ratio, GATES["trl_step"], r.spread, detail)]


def _rate(flops: float) -> str:
    return f"{flops / 1e12:.1f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.0f} GFLOP/s"


def step_shapes(task: Task) -> tuple[step_flops.StepShape, step_flops.StepShape]:
    """Sizes of a row's step, TRL's and ours; ours as the mean row has it."""
    side = our_step.OurStep(task)
    rows = side.rows()
    blank = (0,) * task.completion
    rollouts = [our_step.Rollout(blank, our_step.spans(i, task)) for i in range(len(rows))]
    packed = pack_scores(rows, rollouts, roles=our_step.ROLES, config=task.config, buckets=side.buckets)
    prompt = round(np.mean([len(row.prompt.ids) for row in rows]))
    theirs = step_flops.StepShape(
        patches=len(rows[0].images[0].patches),
        prompt=prompt,
        completion=task.completion,
        encodings=2,  # the student's and the teacher's forward passes have the images again
        teachers=((0, prompt + task.completion),),
        supervised=task.completion,
    )
    branches = step_flops.branches(packed.teacher.segment_ids[0])
    supervised = round(np.mean(np.sum(packed.supervised.role >= 0, 1)))
    return theirs, dataclasses.replace(theirs, encodings=0, teachers=branches, supervised=supervised)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 8), ("tokens", 64), ("rounds", 6)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    parser.add_argument(
        "--scale", choices=SCALES, default="100M", help=f"{', '.join(SCALES)}; small is to try the script"
    )
    parser.add_argument("--json", type=pathlib.Path, help="file for the results, a list")
    parser.add_argument("--readme", type=pathlib.Path, help="file whose table is made anew")
    args = parser.parse_args(argv)
    for name, least in (("rows", 1), ("tokens", 8), ("rounds", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)} must be at least {least}")
    if args.scale != "100M" and args.readme:
        parser.error(f"--readme makes the table of --scale 100M; leave out --scale {args.scale}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if line := missing():
        print(line, file=sys.stderr)
        return 2
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is PyTorch's, too
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(pathlib.Path(folder), scale=SCALES[args.scale], rows=args.rows, completion=args.tokens)
        out = results(task, measure(task, rounds=args.rounds))
    if args.scale != "100M":  # the gates are of that scale
        out = [dataclasses.replace(r, gate=None) for r in out]
    for r in out:
        print(r.line(), flush=True)
    if args.json:
        args.json.write_text(json.dumps([r.json() for r in out], indent=2) + "\n")
    if args.readme:
        write_readme(args.readme, out, marker=start("benchmarks.trl"))
    return 0 if all(r.holds for r in out) else 1


if __name__ == "__main__":
    sys.exit(main())
