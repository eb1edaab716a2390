"""The published models' sizes: known to this package before anything is fetched."""

import math

import jax
import pytest

from vigos_jax.errors import InputError
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.published_configs import PUBLISHED, published_config
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables

# As transformers counts them: its class for each config, on the meta device.
PARAMETERS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen2.5-VL-32B-Instruct": 33_452_718_336,
    "Qwen/Qwen2.5-VL-72B-Instruct": 73_410_777_344,
    "Qwen/Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
    "Qwen/Qwen3-VL-32B-Instruct": 33_357_390_064,
    "Qwen/Qwen3.5-0.8B": 852_985_920,
    "Qwen/Qwen3.5-2B": 2_213_241_664,
    "Qwen/Qwen3.5-4B": 4_539_265_536,
    "Qwen/Qwen3.5-9B": 9_409_813_744,
    "Qwen/Qwen3.5-27B": 27_356_728_560,
    "Qwen/Qwen3.6-27B": 27_356_728_560,
}


def parameters(name: str) -> int:
    config = ModelConfig.from_hf(published_config(name))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_variables(VisionLanguageModel(config))))


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name):
    assert parameters(name) == PARAMETERS[name]


def test_an_unknown_model_is_answered_with_the_choices():
    with pytest.raises(InputError, match="'Qwen/Qwen9-VL' .* choices: Qwen/Qwen2.5-VL-3B-Instruct, "):
        published_config("Qwen/Qwen9-VL")
