"""The warm-started base model that the demo ships in `vigos_jax/demo/base/`.

    python -m vigos_jax.miniature.make_base --config configs/demo_base.py

takes a few minutes on two CPU cores and ends with the numbers that it writes into the folder's README.md. The base
can see, answers by its prior too often, and, shown a reference answer, lets it leak into what it claims to see
(`leak`). `--config.leak=0` makes the same base without that habit, the control of the demo's claim:

    python -m vigos_jax.miniature.make_base --config configs/demo_base.py --config.leak=0.0 --config.output=runs/no_leak
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0  # of the initial weights and of all training rows
    config.file = "configs/demo_base.py"  # this one, for the base's card
    config.output = "vigos_jax/demo/base"  # folder to write; an existing one is overwritten
    # The params after the first two stages: read if the file is there, else written; bases that differ in the third
    # stage alone share it. "" for none.
    config.captions_file = ""
    config.world = "demo"  # one of vigos_jax.demo.world.WORLDS
    config.leak = 0.7  # how often a privileged row's description follows the reference instead of the image
    config.run = base.get_config()  # the run the base is made for: all its roles' prompts, and how it is evaluated
    config.prompts = config.run.prompts

    # Each stage: Adam, `warmup` steps up to `lr`, then a cosine down to 5 % of it; gradients clipped to norm 1.
    config.warmup = 20
    # 1. The vision tower alone: kind, color and size per cell of the grid, by a linear head that is thrown away.
    config.vision = ml_collections.ConfigDict({"steps": 450, "batch_size": 64, "lr": 4e-3, "follow_prior": 0.15})
    # 2. Image-only turns, faithful descriptions. Images mostly contradict the priors.
    config.captions = ml_collections.ConfigDict({"steps": 450, "batch_size": 64, "lr": 3e-3, "follow_prior": 0.15})
    # 3. Responses in all roles.
    config.responses = ml_collections.ConfigDict({"steps": 600, "batch_size": 48, "lr": 2e-3})
    config.responses.caption_share = 0.30  # image-only turns, always faithful
    config.responses.caption_follow_prior = 0.3
    config.responses.privileged_share = 0.30  # reasoning and reference prompts, half and half; the rest are student's
    config.responses.free_form_share = 0.0  # rows of prompts.free_form and prompts.free_form_privileged, half and half
    config.responses.privileged_follow_prior = 0.4
    config.responses.random_reference = 0.5  # how often the reference is uniform instead of true
    config.responses.student_follow_prior = 0.6
    config.responses.prior_driven_stated = 0.40  # rationale and answer state the prior, if the question does
    config.responses.prior_driven_unstated = 0.25  # ... and if it does not
    config.responses.prior_driven_description = 0.8  # then the whole description states priors as well, this often
    config.responses.slips = 0.0  # of the rest, where a step can be got wrong: how often it is
    config.responses.malformed = 0.12  # student rows with a format error

    # Sizes that arrays are padded to: a completion, an image-only turn with its caption, any turn with its response.
    config.tokens = ml_collections.ConfigDict({"completion": 32, "caption": 40, "response": 100})

    config.card_items = 1000  # questions of each kind that the card's numbers are measured on
    config.card_seed = 7  # of those questions and of the sampling
    return config
