"""Control: the perception teacher sees no image, so that what is learnt of descriptions is learnt without eyes.

    python -m vigos_jax.main --config configs/text_only_teacher.py

On the demo as it is; everything else is configs/base.py. Compare it with configs/no_perception.py, which leaves the
role out.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.roles.perception.image = "none"
    return config
