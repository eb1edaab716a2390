"""The `config.json` of the published models, so that a run can be planned before anything is fetched.

Only what describes the computation is here; a folder's own file always wins.
"""

from typing import Any

from vigos_jax.errors import InputError

# The ids of the common tokenizer of Qwen2.5-VL and Qwen3-VL.
_TOKENS = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
}


def _qwen2_5_vl(
    hidden: int, layers: int, heads: tuple[int, int], ffn: int, vocabulary: int, *, tied: bool, vision_ffn: int
) -> dict[str, Any]:
    """heads: of queries, of keys and values."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **_TOKENS,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": ffn,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": vision_ffn,
            "num_heads": 16,
            "out_hidden_size": hidden,
            "hidden_act": "silu",
            "in_channels": 3,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
    }


def _qwen3_vl(
    hidden: int, layers: int, heads: tuple[int, int], ffn: int, *, tied: bool, tower: tuple[int, int, int],
    deepstack: list[int],
) -> dict[str, Any]:  # fmt: skip
    """heads: of queries, of keys and values; tower: depth, hidden and ffn width."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        **{k: v for k, v in _TOKENS.items() if k not in ("bos_token_id", "eos_token_id")},
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "bos_token_id": _TOKENS["bos_token_id"],
            "eos_token_id": _TOKENS["eos_token_id"],
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "head_dim": 128,
            "intermediate_size": ffn,
            "vocab_size": 151936,
            "tie_word_embeddings": tied,
            "attention_bias": False,
            "hidden_act": "silu",
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5e6,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            **_qwen3_tower(hidden, *tower, heads=16),
            "deepstack_visual_indexes": deepstack,
        },
    }


def _qwen3_tower(out: int, depth: int, hidden: int, ffn: int, *, heads: int) -> dict[str, Any]:
    """out: the decoder's width."""
    return {
        "depth": depth,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_heads": heads,
        "out_hidden_size": out,
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
    }


def _qwen3_5(
    hidden: int, layers: int, heads: tuple[int, int, int], ffn: int, *, tied: bool, tower: tuple[int, int, int],
    tower_heads: int = 16,
) -> dict[str, Any]:  # fmt: skip
    """heads: of queries, of keys and values, of a linear layer's values; tower: depth, hidden and ffn width."""
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "image_token_id": 248056,
        "video_token_id": 248057,
        "vision_start_token_id": 248053,
        "vision_end_token_id": 248054,
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "qwen3_5_text",
            "eos_token_id": 248044,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (layers // 4),
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": heads[2],
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "intermediate_size": ffn,
            "vocab_size": 248320,
            "tie_word_embeddings": tied,
            "attention_bias": False,
            "hidden_act": "silu",
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.25,
                "mrope_section": [11, 11, 10],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {"model_type": "qwen3_5", **_qwen3_tower(hidden, *tower, heads=tower_heads)},
    }


_SMALL = {"tower": (24, 1024, 4096), "deepstack": [5, 11, 17]}
_LARGE = {"tower": (27, 1152, 4304), "deepstack": [8, 16, 24]}
_MIDDLE, _WIDE = (24, 1024, 4096), (27, 1152, 4304)  # Qwen3.5's towers
_QWEN3_5_27B = _qwen3_5(5120, 64, (24, 4, 48), 17408, tied=False, tower=_WIDE)
_CONFIGS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5_vl(2048, 36, (16, 2), 11008, 151936, tied=True, vision_ffn=3420),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5_vl(3584, 28, (28, 4), 18944, 152064, tied=False, vision_ffn=3420),
    "Qwen/Qwen2.5-VL-32B-Instruct": _qwen2_5_vl(5120, 64, (40, 8), 27648, 152064, tied=False, vision_ffn=3456),
    "Qwen/Qwen2.5-VL-72B-Instruct": _qwen2_5_vl(8192, 80, (64, 8), 29568, 152064, tied=False, vision_ffn=3456),
    "Qwen/Qwen3-VL-2B-Instruct": _qwen3_vl(2048, 28, (16, 8), 6144, tied=True, **_SMALL),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_vl(2560, 36, (32, 8), 9728, tied=True, **_SMALL),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3_vl(4096, 36, (32, 8), 12288, tied=False, **_LARGE),
    "Qwen/Qwen3-VL-32B-Instruct": _qwen3_vl(5120, 64, (64, 8), 25600, tied=False, **_LARGE),
    "Qwen/Qwen3.5-0.8B": _qwen3_5(1024, 24, (8, 2, 16), 3584, tied=True, tower=(12, 768, 3072), tower_heads=12),
    "Qwen/Qwen3.5-2B": _qwen3_5(2048, 24, (8, 2, 16), 6144, tied=True, tower=_MIDDLE),
    "Qwen/Qwen3.5-4B": _qwen3_5(2560, 32, (16, 4, 32), 9216, tied=True, tower=_MIDDLE),
    "Qwen/Qwen3.5-9B": _qwen3_5(4096, 32, (16, 4, 32), 12288, tied=False, tower=_WIDE),
    "Qwen/Qwen3.5-27B": _QWEN3_5_27B,
    "Qwen/Qwen3.6-27B": _QWEN3_5_27B,
}
PUBLISHED = tuple(_CONFIGS)


def published_config(hub_id: str) -> dict[str, Any]:
    """The parsed `config.json` of a published model, as `ModelConfig.from_hf` takes it.

    Raises:
      InputError: the model is not among `PUBLISHED`.
    """
    if hub_id not in _CONFIGS:
        raise InputError(f"{hub_id!r} is not a model whose sizes are known; choices: {', '.join(PUBLISHED)}")
    return _CONFIGS[hub_id]
