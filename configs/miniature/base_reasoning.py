r"""A base of the miniature's second world, whose questions take a step or two after the look.

    python -m vigos_jax.miniature.make_base --config configs/miniature/base_reasoning.py --config.seed=301 \
        --config.leak=0.7 --config.output=runs/miniature/base-demo_reasoning-0.7-301

Like the bases of configs/miniature/base.py, it also learns to answer in free form.
"""

import ml_collections

from configs import demo_reasoning_base
from configs.miniature import base


def get_config() -> ml_collections.ConfigDict:
    config = base.with_free_form(demo_reasoning_base.get_config())
    config.file = "configs/miniature/base_reasoning.py"
    return config
