r"""Vanilla on-policy self-distillation (arXiv 2601.18734): free-form answers, one teacher that sees the reference.

    python -m vigos_jax.main --config configs/opsd.py

Nothing asks for a description, so hardly any rollout follows ViGOS's format: `valid_rate` says little here, and one
role scores every token of every rollout. Clipped per vocabulary entry, as its paper does, with
`--config.roles.privileged.clip=0.05`. On the demo, whose base only knows the structured format, use
`configs/opsd_same_prompt.py` to compare.
"""

from ml_collections import ConfigDict

from configs import base

TASK = "Reason step by step, then give the final answer in \\boxed{}."


def get_config() -> ConfigDict:
    config = base.get_config()
    config.prompts = ConfigDict(
        {
            "student": {"user": "{problem}\n" + TASK, "assistant_prefill": ""},
            "privileged": {"user": "{problem}\nReference answer: {reference}\n" + TASK, "assistant_prefill": ""},
        }
    )
    privileged = base.role(("completion",), "always", "forward_kl", weight=1.0, clip=0.0, clip_per="entry")
    config.roles = ConfigDict({"privileged": privileged})
    return config
