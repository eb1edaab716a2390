"""ViGOS on the demo's second world, whose answers take a step or two of reasoning after the look.

    python -m vigos_jax.main --config configs/demo_reasoning.py

As configs/base.py, with another shipped model and other questions: sums, comparisons, a rule that the question gives.
The base errs in seeing, as in the first world, and in reasoning: some steps it has learned wrongly. So both of ViGOS's
teachers have something to teach.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.model.path = config.data.source = "demo_reasoning"
    config.eval.tasks = ("demo_reasoning",)
    return config
