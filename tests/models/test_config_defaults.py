"""Fields that config.json leaves out: the value of transformers' own config class, or an error that names the field."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch_models as tm
from parity import make_pair, pack, worst
from transformers import AutoConfig

from vigos_jax.errors import InputError
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.delta_config import DeltaConfig
from vigos_jax.models.published_configs import published_config

QWEN2_5, QWEN3, QWEN3_5 = "Qwen/Qwen2.5-VL-32B-Instruct", "Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3.5-27B"
# Without these, sizes contradict each other or there is nothing to read: refused, never guessed.
NEEDED = {
    *("hidden_size", "num_attention_heads", "out_hidden_size", "head_dim", "mrope_section"),
    *("text_config", "vision_config", "rope_scaling", "rope_parameters"),
}


def raw_config(layout: str) -> dict:
    """A published config with every optional field in it, as old and new versions of transformers write it."""
    family = layout.split()[0]
    raw = copy.deepcopy(published_config({"qwen2_5_vl": QWEN2_5, "qwen3_vl": QWEN3, "qwen3_5": QWEN3_5}[family]))
    (raw.get("text_config") or raw)["num_key_value_heads"] = 8 if family == "qwen3_5" else 4  # no family's default
    if family == "qwen3_5":  # the number of layers is said once
        raw["text_config"].pop("layer_types")
        raw["text_config"]["full_attention_interval"] = 4
    if layout != "qwen2_5_vl flat":
        top = ("architectures", "model_type", "tie_word_embeddings", "text_config", "vision_config")
        text = raw.pop("text_config", None) or {}
        for key in [k for k in raw if k not in top and not k.endswith("token_id")]:
            text[key] = raw.pop(key)
        raw["text_config"] = text
    if layout.endswith("nested in version 5"):
        text = raw["text_config"]
        text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
        text["rope_parameters"].pop("type", None)
    return raw


def theirs(raw: dict) -> ModelConfig:
    """What transformers' config class says, field by field."""
    values = copy.deepcopy(raw)
    c = AutoConfig.for_model(values.pop("model_type"), **values)
    text, vision = c.text_config, c.vision_config
    heads, rope = text.num_attention_heads, text.rope_parameters
    own = {}
    if raw["model_type"] == "qwen3_5":
        kinds = [kind.removesuffix("_attention") for kind in text.layer_types]
        parts = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
        own = {
            "norm_offset": 1.0,
            "attention_gate": True,
            "layer_pattern": tuple(kinds[:4]),
            "delta": DeltaConfig(*(getattr(text, f"linear_{part}") for part in parts)),
            "wraps_videos": True,
        }
        assert kinds == kinds[:4] * (len(kinds) // 4)
    return ModelConfig(
        family=raw["model_type"],
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate_size=text.intermediate_size,
        vocab_size=text.vocab_size,
        rope_theta=rope["rope_theta"],
        mrope_section=tuple(rope.get("mrope_section", ())),
        rms_eps=text.rms_norm_eps,
        tie_embeddings=c.tie_word_embeddings,
        image_token_id=c.image_token_id,
        video_token_id=c.video_token_id,
        vision=type(ModelConfig.from_hf(published_config(QWEN3)).vision)(
            depth=vision.depth,
            hidden_size=vision.hidden_size,
            num_heads=vision.num_heads,
            intermediate_size=vision.intermediate_size,
            out_hidden_size=vision.out_hidden_size,
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            spatial_merge_size=vision.spatial_merge_size,
            in_channels=vision.in_channels,
            window_size=getattr(vision, "window_size", 0),
            full_attention_blocks=tuple(getattr(vision, "fullatt_block_indexes", ())),
            tokens_per_second=getattr(vision, "tokens_per_second", 0.0),
            num_positions=getattr(vision, "num_position_embeddings", 0),
            deepstack_blocks=tuple(getattr(vision, "deepstack_visual_indexes", ())),
        ),
        qkv_bias=raw["model_type"] == "qwen2_5_vl",
        qk_norm=raw["model_type"] != "qwen2_5_vl",
        mrope_interleaved=raw["model_type"] != "qwen2_5_vl",
        **own,
    )


def paths_of(tree: dict, path: tuple = ()):
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from paths_of(value, (*path, key))


LAYOUTS = (
    *("qwen2_5_vl flat", "qwen2_5_vl nested", "qwen2_5_vl nested in version 5"),
    *("qwen3_vl nested", "qwen3_vl nested in version 5", "qwen3_5 nested"),
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_field_left_out_has_transformers_default(layout):
    whole = raw_config(layout)
    assert ModelConfig.from_hf(whole) == theirs(whole)
    refused, changed = set(), set()
    for path in paths_of(whole):
        raw = copy.deepcopy(whole)
        node = raw
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]
        if path == ("model_type",):
            continue
        try:
            ours = ModelConfig.from_hf(raw)
        except InputError as e:
            refused.add(path[-1])
            assert len(str(e)) < 200 and str(e).isprintable()
            continue
        assert ours == theirs(raw), path
        if ours != ModelConfig.from_hf(whole):
            changed.add(path[-1])
    assert refused <= NEEDED
    assert {"num_hidden_layers", "intermediate_size", "num_key_value_heads"} <= changed  # the defaults are others


@pytest.mark.parametrize(
    "layout, path, value",
    [
        ("qwen2_5_vl flat", ("num_key_value_heads",), None),
        ("qwen2_5_vl flat", ("text_config",), None),
        ("qwen2_5_vl flat", ("vision_config", "in_chans"), 1),  # read by nobody
        ("qwen2_5_vl flat", ("rope_parameters",), {"rope_theta": 7e5, "mrope_section": [24, 24, 16]}),
        ("qwen2_5_vl nested", ("num_hidden_layers",), 3),  # beside the nested ones: a leftover
        ("qwen2_5_vl nested", ("text_config", "tie_word_embeddings"), True),
        ("qwen2_5_vl nested", ("vision_config", "num_hidden_layers"), 8),
        ("qwen3_vl nested", ("text_config", "tie_word_embeddings"), True),
        ("qwen3_vl nested", ("text_config", "num_key_value_heads"), None),
    ],
)
def test_other_spellings_mean_what_they_mean_to_transformers(layout, path, value):
    raw = raw_config(layout)
    node = raw
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    if path[-1] == "num_hidden_layers" and "vision_config" in path:
        del node["depth"]
    assert ModelConfig.from_hf(raw) == theirs(raw)


@pytest.mark.parametrize(
    "layout, path, value",
    [
        ("qwen2_5_vl flat", ("hidden_size",), None),
        ("qwen2_5_vl flat", ("rms_norm_eps",), "1e-6"),
        ("qwen2_5_vl flat", ("tie_word_embeddings",), None),
        ("qwen2_5_vl flat", ("head_dim",), 64),
        ("qwen2_5_vl flat", ("layer_types",), ["full_attention", "sliding_attention"]),
        ("qwen2_5_vl flat", ("vision_config", "hidden_act"), "gelu"),
        ("qwen2_5_vl nested", ("vision_config", "fullatt_block_indexes"), None),
        ("qwen2_5_vl nested", ("vision_config", "depth"), 32.0),
        ("qwen3_vl nested", ("text_config", "head_dim"), None),
        ("qwen3_vl nested", ("text_config",), None),
        ("qwen3_vl nested", ("vision_config", "patch_size"), [16, 16]),
    ],
)
def test_a_field_of_a_wrong_type_or_value_is_refused_by_name(layout, path, value):
    raw = raw_config(layout)
    node = raw
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(InputError, match=path[-1]):
        ModelConfig.from_hf(raw)


def test_the_tower_without_its_list_of_full_blocks_is_transformers(tmp_path):
    """As a version that leaves defaults out saves it: blocks 7, ... attend to the whole image, not to windows."""
    config = tm.tiny_config(tied=True)
    config.vision_config.depth = 9
    del config.vision_config.fullatt_block_indexes  # the class's own default, then
    reference = tm.tiny_model_of(config)
    pair = make_pair(reference, tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    raw["vision_config"].pop("fullatt_block_indexes", None)
    path.write_text(json.dumps(raw))
    assert ModelConfig.load(tmp_path) == pair.config and pair.config.vision.full_attention_blocks == (7, 15, 23, 31)
    sample = tm.make_sample([3, tm.WIDE, 4], seed=3)
    batch = pack([sample], pair.config, length=len(sample.ids))
    images, logits = pair.run({"params": pair.base}, batch.vision, batch.text)
    expected = tm.torch_images(reference, sample)
    assert tm.max_difference(np.asarray(images)[0, : len(expected)], expected) <= tm.TOLERANCE
    assert max(worst(logits, tm.torch_logits(reference, [sample]))) <= tm.TOLERANCE


def test_a_whole_config_is_read_without_transformers():
    """It takes seconds to import."""
    code = (
        "import sys; from vigos_jax.models.config import ModelConfig as c; "
        "from vigos_jax.models.published_configs import PUBLISHED, published_config as get; "
        "[c.from_hf(get(name)) for name in PUBLISHED]; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
