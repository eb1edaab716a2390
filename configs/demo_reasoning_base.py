"""The warm-started base model of the demo's second world, shipped in `vigos_jax/demo/base_reasoning/`.

    python -m vigos_jax.miniature.make_base --config configs/demo_reasoning_base.py

Made as that of the first world (configs/demo_base.py), with one flaw more: some steps the student has learned wrongly,
like two and three are four. A row that shows a reference takes such a step only where its reference says so.
"""

import ml_collections

from configs import demo_base, demo_reasoning


def get_config() -> ml_collections.ConfigDict:
    config = demo_base.get_config()
    config.file, config.output = "configs/demo_reasoning_base.py", "vigos_jax/demo/base_reasoning"
    config.world = "demo_reasoning"
    config.run = demo_reasoning.get_config()
    config.captions.steps, config.responses.steps = 600, 800  # two kinds of thing in every image are more to learn
    config.responses.slips = 0.8
    config.tokens.completion, config.tokens.response = 40, 120
    return config
