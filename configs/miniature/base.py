r"""A base of the miniature: the demo's, made anew by seed and leak, that has also learned to answer in free form.

    python -m vigos_jax.miniature.make_base --config configs/miniature/base.py --config.seed=301 --config.leak=0.7 \
        --config.output=runs/miniature/base-demo-0.7-301

To each batch of the demo's 48 rows come eight without a description, for `configs/opsd.py`. All bases of
`configs/miniature/study.py` are made this way.
"""

import ml_collections

from configs import demo_base, opsd


def get_config() -> ml_collections.ConfigDict:
    config = with_free_form(demo_base.get_config())
    config.file = "configs/miniature/base.py"
    return config


def with_free_form(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A base's config with eight rows in free form more per batch, and a card of fewer questions."""
    free_form = opsd.get_config().prompts
    config.prompts = config.prompts.copy_and_resolve_references()  # those of config.run stay as they are
    config.prompts.free_form, config.prompts.free_form_privileged = free_form.student, free_form.privileged
    config.responses.batch_size, config.responses.free_form_share = 56, 8 / 56
    config.responses.caption_share, config.responses.privileged_share = 14 / 56, 14 / 56
    config.card_items = 250
    return config
