"""A role of your own: self-distillation from a demonstration, with teachers that follow the student.

    python -m vigos_jax.main --config configs/sdft_like.py

In the manner of self-distillation fine-tuning: one teacher is shown the answer as an example of a good response, scores
every token of the student's rollout by KL(student || teacher), and is a moving average of the student. Everything
that makes it a method of its own is in this file: a prompt, a role, and where the teacher's weights come from.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.prompts.demonstration = ConfigDict(
        {
            "user": "{problem}\nA good response ends with {reference}. Answer in your own words.\n" + base.FORMAT,
            "assistant_prefill": "<description>",
        }
    )
    config.roles = ConfigDict()
    config.roles.demonstration = base.role(("completion",), "always", "reverse_kl", weight=1.0, clip=0.0)
    config.teacher.weights = "ema"
    config.teacher.ema_rate = 0.02
    return config
