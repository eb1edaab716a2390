"""Vision-OPD (arXiv 2605.18740): the teacher sees the part of the image that matters, the student the whole.

    python -m vigos_jax.main --config configs/vision_opd.py --config.data.source=data/boxes.jsonl

Rows need a column `bbox`, [x1, y1, x2, y2] in pixels. No answer is shown to anybody. The paper trains Qwen3.5-4B and
9B on 6,000 rows; the direction of the divergence and the margin around the box are choices made here, and the settings
are those of the ViGOS paper. Not run.
"""

from ml_collections import ConfigDict

from configs import base, opsd
from configs.qwen2_5_vl_3b import of_the_paper


def get_config() -> ConfigDict:
    config = of_the_paper("Qwen/Qwen3.5-4B")
    config.data.source = "data/boxes.jsonl"
    config.prompts = ConfigDict(
        {name: {"user": "{problem}\n" + opsd.TASK, "assistant_prefill": ""} for name in ("student", "close")}
    )
    close = base.role(
        *(("completion",), "always", "forward_kl"),
        weight=1.0, clip=0.0, image="crop", image_column="bbox", image_margin=0.1,
    )  # fmt: skip
    config.roles = ConfigDict({"close": close})
    return config
