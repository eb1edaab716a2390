"""The paper in miniature: every method and ablation on the demo's world, over bases and seeds.

    pip install -e '.[study]'
    python -m vigos_jax.miniature.study --config configs/miniature/study.py --workdir runs/miniature

Makes the bases, trains, measures PALR, and writes tables and figures into the workdir; some hours on two cores. It can
be stopped at any time: the same command resumes. docs/miniature.md has what came out.

Nothing was chosen on these seeds. The runs are those of the named configs, whose settings were fixed on the shipped
base (seed 0), on runs of seeds 0 to 2 and on the evaluation's questions of seed 42. Here a seed has its own base, made
from nothing, its own data order and rollouts, and its own questions.
"""

from ml_collections import ConfigDict

METHODS = {
    "opsd": "configs/opsd.py",
    "opsd_same_prompt": "configs/opsd_same_prompt.py",
    "vigos": "configs/base.py",
    "no_perception": "configs/no_perception.py",
    "no_reasoning": "configs/no_reasoning.py",
    "no_reference": "configs/no_reference.py",
    "reference_forward_kl": "configs/reference_forward_kl.py",
}


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.base = "configs/miniature/base.py"  # how a base is made; its seed and leak are given
    config.methods = ConfigDict(METHODS)  # name -> config file of a run
    config.free_form = ("opsd",)  # methods without a description: no valid rollouts, no PALR
    # The leak is what the paper's argument hangs on: without it, OPSD and ViGOS must come out alike.
    config.groups = ConfigDict()
    config.groups.leaky = group(0.7, seeds=(101, 102, 103, 104, 105), methods=tuple(METHODS))
    config.groups.half = group(0.35, seeds=(101, 102), methods=("opsd_same_prompt", "vigos"))
    config.groups.faithful = group(0.0, seeds=(101, 102, 103), methods=("opsd_same_prompt", "vigos"))
    config.questions = 500  # of each kind (conflict, prior) that a student answers before and after its run
    config.palr_rows = 400  # conflict images whose rollouts PALR is measured on
    config.workers = 2  # jobs at a time, each on its share of the cores
    return config


def group(leak: float, *, seeds: tuple[int, ...], methods: tuple[str, ...]) -> ConfigDict:
    """Bases of one leak strength, one per seed, and the methods that are run on each."""
    return ConfigDict({"leak": leak, "seeds": seeds, "methods": methods})
