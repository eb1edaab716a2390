"""The paper in miniature: every method and ablation on both worlds of the demo, over bases and seeds.

    pip install -e '.[study]'
    python -m vigos_jax.miniature.study --config configs/miniature/study.py --workdir runs/miniature

Makes the bases, trains, measures PALR, and writes tables and figures into the workdir, anew after each base's last
job; seven hours or so on two cores. It can be stopped at any time: the same command resumes. To measure further seeds
or methods of your own without repeating what docs/miniature.md shows, name them in a copy of this file, with
`config.known` set to docs/miniature/results.json.

Nothing was chosen on these seeds. The runs are those of the named configs, whose settings were fixed on the shipped
bases (seed 0), on runs of seeds 0 to 2 and on the evaluation's questions of seed 42. Here a seed has its own base, made
from nothing, its own data order and rollouts, and its own questions.
"""

from ml_collections import ConfigDict

# The paper's 1,488 steps at 5e-6 move the weights as far as 80 at this rate, if every step goes the same way.
PAPER_RATE = f"--config.optimizer.learning_rate={1488 * 5e-6 / 80:.1e}"
SEES = "--config.roles.{}.image={}".format
WEIGHS = "--config.roles.{}.token_weights={}".format

# name -> the options of a run
METHODS = {
    "opsd": ("--config=configs/opsd.py",),
    "opsd_same_prompt": ("--config=configs/opsd_same_prompt.py",),
    "vigos": ("--config=configs/base.py",),
    # the paper's ablations
    "no_perception": ("--config=configs/no_perception.py",),
    "no_reasoning": ("--config=configs/no_reasoning.py",),
    "no_reference": ("--config=configs/no_reference.py",),
    "reference_forward_kl": ("--config=configs/reference_forward_kl.py",),
    # the paper's clip of 0.05, which the demo leaves out, at the demo's learning rate and at the paper's, scaled
    "clipped": ("--config=configs/paper.py",),
    "paper_rate": ("--config=configs/base.py", PAPER_RATE),
    "paper_rate_clipped": ("--config=configs/paper.py", PAPER_RATE),
    # a teacher that sees another row's image: what of its lesson comes from looking
    "shuffled_perception": ("--config=configs/base.py", SEES("perception", "shuffled")),
    "shuffled_reasoning": ("--config=configs/base.py", SEES("reasoning", "shuffled")),
    # tokens that the image decides count more, as in configs/va_opd.py
    "image_dependence": (
        "--config=configs/base.py",
        *(WEIGHS(r, "image_dependence") for r in ("perception", "reasoning")),
    ),
}


def get_config() -> ConfigDict:
    config = ConfigDict()
    # Each world of the demo, and how its bases are made; seed and leak are given.
    config.worlds = ConfigDict({"demo": "configs/miniature/base.py"})
    config.worlds.demo_reasoning = "configs/miniature/base_reasoning.py"
    config.methods = ConfigDict(METHODS)
    config.free_form = ("opsd",)  # methods without a description: no valid rollouts, no PALR
    # The leak is what the paper's argument hangs on: without it, OPSD and ViGOS must come out alike.
    config.groups = ConfigDict()
    config.groups.leaky = group(0.7, seeds=(301, 302, 303, 304, 305), methods=tuple(METHODS))
    config.groups.half = group(0.35, seeds=(301, 302, 303), methods=("opsd_same_prompt", "vigos"))
    config.groups.faithful = group(0.0, seeds=(301, 302, 303), methods=("opsd_same_prompt", "vigos"))
    config.questions = 500  # of each kind (conflict, prior) that a student answers before and after its run
    config.palr_rows = 400  # conflict images whose rollouts PALR is measured on
    config.workers = 2  # jobs at a time, each on its share of the cores
    config.known = ""  # results.json of an earlier run: what it has is not run again, and stands in the new tables
    return config


def group(leak: float, *, seeds: tuple[int, ...], methods: tuple[str, ...]) -> ConfigDict:
    """Bases of one leak strength, one per world and seed, and the methods that are run on each."""
    return ConfigDict({"leak": leak, "seeds": seeds, "methods": methods})
