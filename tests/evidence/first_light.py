"""Does the demo show what it claims? ViGOS, one-role OPSD and blank pictures on the shipped base, over seeds.

    python tests/evidence/first_light.py [--seeds 0 1 2] [--workdir runs/first_light]

Runs each as the command line would, prints every run's rates and the checks, and exits 1 if one fails. Finished runs
are not repeated. About three minutes a run on two cores.
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUNS = {
    "vigos": ["--config", "configs/base.py"],
    "opsd": ["--config", "configs/opsd_same_prompt.py"],
    "blank": ["--config", "configs/base.py", "--config.data.blank_images=True"],
}
RATES = ("score", "prior", "valid", "accuracy_given_valid", "description_accuracy", "leak")


def run(name: str, seed: int, workdir: pathlib.Path) -> dict:
    """Trains one run, or finds it finished, and returns its results.json."""
    folder = workdir / f"{name}-{seed}"
    command = [sys.executable, "-m", "vigos_jax.main", *RUNS[name], f"--config.seed={seed}", f"--workdir={folder}"]
    command += ["--config.export.after_training=False"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"{name}, seed {seed}: exit code {done.returncode}")
    return json.loads((folder / "results.json").read_text())


def check(results: dict[tuple[str, int], dict], seeds: list[int]) -> list[tuple[str, bool]]:
    """What first light promises, for every seed by itself."""
    out = []
    for seed in seeds:
        base = results["vigos", seed]["base"]
        vigos, opsd, blank = (results[name, seed]["trained"] for name in RUNS)
        gain, over_opsd = vigos["score"] - base["score"], vigos["score"] - opsd["score"]
        blank_gain, prior_change = blank["score"] - base["score"], vigos["prior"] - base["prior"]
        given_valid = vigos["accuracy_given_valid"] - base["accuracy_given_valid"]
        leak_change = vigos["leak"] - base["leak"]
        out += [
            (f"seed {seed}: Score changes by {gain:+.3f}, at least +0.10", gain >= 0.10),
            (f"seed {seed}: Prior changes by {prior_change:+.3f}, at least -0.02", prior_change >= -0.02),
            (f"seed {seed}: accuracy given valid changes by {given_valid:+.3f}, above 0", given_valid > 0),
            (f"seed {seed}: leak changes by {leak_change:+.3f}, below 0", leak_change < 0),
            (f"seed {seed}: Score is {over_opsd:+.3f} above OPSD's, at least 0.10", over_opsd >= 0.10),
            (f"seed {seed}: with blank pictures Score changes by {blank_gain:+.3f}, at most +0.02", blank_gain <= 0.02),
        ]
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workdir", type=pathlib.Path, default=ROOT / "runs" / "first_light")
    args = parser.parse_args()
    print(f"{'run':14}" + "".join(f"{rate:>22}" for rate in RATES))
    results = {}
    for seed in args.seeds:
        for name in RUNS:
            results[name, seed] = run(name, seed, args.workdir)
            if name == "vigos":
                _print(f"base, seed {seed}", results[name, seed]["base"])
            _print(f"{name}, seed {seed}", results[name, seed]["trained"])
    checks = check(results, args.seeds)
    for text, holds in checks:
        print(("ok    " if holds else "FAILS ") + text)
    return 0 if all(holds for _, holds in checks) else 1


def _print(title: str, rates: dict) -> None:
    print(f"{title:14}" + "".join(f"{rates[rate]:22.3f}" for rate in RATES), flush=True)


if __name__ == "__main__":
    sys.exit(main())
