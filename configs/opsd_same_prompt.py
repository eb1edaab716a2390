"""On-policy self-distillation with ViGOS's prompts: one teacher that sees the answer scores every token.

    python -m vigos_jax.main --config configs/opsd_same_prompt.py

The control for the prompt: format and rollouts are those of `configs/base.py`, only the role table differs. On the demo
this does worse than its own base: the teacher that knows the answer shapes the description too, and what it believes
because of the text leaks into what the student claims to see. README.md has the measured numbers.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.roles = ConfigDict({"reference": base.role(("completion",), "always", "forward_kl", weight=1.0, clip=0.0)})
    return config
