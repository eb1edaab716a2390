"""Like VA-OPD (arXiv 2605.21924): on-policy distillation that leans on the tokens which the image decides.

    python -m vigos_jax.main --config configs/va_opd.py

Qwen3-VL-8B teaches the 2B; a token's weight is how much the teacher's log-probability of it falls without the image.
The paper averages the divergence of tokens with a large and a small such difference separately, weighs rollouts by it
too, and takes a coarse image instead of none; it trains on Geometry3K and ViRL39K with teachers of 4B, 8B and 32B, and
reports gains over plain distillation on all of its eight benchmarks. Not run.
"""

from ml_collections import ConfigDict

from configs import opd


def get_config() -> ConfigDict:
    config = opd.get_config()
    config.model.path = "Qwen/Qwen3-VL-2B-Instruct"
    config.roles.larger.model = "Qwen/Qwen3-VL-8B-Instruct"
    config.roles.larger.token_weights = "image_dependence"
    return config
