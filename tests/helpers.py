"""Things several tests need."""

import json
import pathlib
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

# The order fixes the ids: they follow the vocabulary, as in the published models. True: flagged as special.
ADDED_TOKENS = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<|vision_start|>": True,
    "<|vision_end|>": True,
    "<|vision_pad|>": True,
    "<|image_pad|>": True,
    "<|video_pad|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<|fim_prefix|>": False,
    "<|file_sep|>": False,
}
# How Qwen2 tokenizers cut text before they merge.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{ '<|im_start|>system\\nBe useful.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}{{ message.content }}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' -%}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
CORPUS = [
    "<description> three red squares, a blue circle </description> <think> it is red </think> \\boxed{red}",
    "What colour is the circle? How many squares are there? Answer the question about the picture.",
    "system user assistant You are given a question and a reference answer. 1 2 3 4 5 yes no A B C D",
]


def make_processor_folder(
    path: str | pathlib.Path,
    *,
    vocab_padding: int = 4,
    min_pixels: int = 56 * 56,
    max_pixels: int = 112 * 112,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    chat_template: str = CHAT_TEMPLATE,
    family: str = "qwen2_5_vl",
    head_dim: int = 16,
) -> pathlib.Path:
    """Writes a tiny folder of a family without weights: config, tokenizer, image and generation settings.

    config.json has every field that is read: for one that it lacks, transformers would be imported, which takes long.

    Args:
      path: the folder; made if it is not there.
      vocab_padding: embedding rows beyond the tokenizer's, as published models have.
      min_pixels, max_pixels: what the image processor resizes to.
      text, vision: fields that replace those of config.json and of its vision_config.
      head_dim: of both; the models have two heads.
    """
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    for content, special in ADDED_TOKENS.items():
        token = tokenizers.AddedToken(content, special=special, normalized=False)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    tokenizer.save(str(path / "tokenizer.json"))
    ids = {content: tokenizer.token_to_id(content) for content in ADDED_TOKENS}

    _write(
        path / "tokenizer_config.json",
        tokenizer_class="Qwen2Tokenizer",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        added_tokens_decoder={
            str(ids[content]): {"content": content, "special": special, "normalized": False}
            | dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
            for content, special in ADDED_TOKENS.items()
        },
    )
    _write(path / "chat_template.json", chat_template=chat_template)
    _write(path / "generation_config.json", eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]])
    _write(
        path / "preprocessor_config.json",
        image_processor_type="Qwen2VLImageProcessor",
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        patch_size=14 if family == "qwen2_5_vl" else 16,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.25, 0.3, 0.35],
    )
    vision_config = {
        "depth": 2,
        "hidden_size": 2 * head_dim,
        "num_heads": 2,
        "intermediate_size": 48,
        "out_hidden_size": 2 * head_dim,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "in_channels": 3,
        "hidden_act": "silu",
        "tokens_per_second": 4,
    }
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": 2 * head_dim,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "silu",
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "vocab_size": tokenizer.get_vocab_size() + vocab_padding,
        "max_position_embeddings": 4096,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [n * head_dim // 16 for n in (2, 3, 3)]},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    if family != "qwen2_5_vl":
        config, vision_config = (_as_qwen3 if family == "qwen3_vl" else _as_qwen3_5)(config, vision_config)
    config |= (text or {}) | {"vision_config": vision_config | (vision or {})}
    _write(path / "config.json", **config)
    return path


def _as_qwen3(config: dict[str, Any], vision: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same sizes in the layout and with the parts of Qwen3-VL."""
    outer = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id", "tie_word_embeddings")
    text = {k: v for k, v in config.items() if k not in (*outer, "architectures", "model_type")}
    text["rope_scaling"] = text["rope_scaling"] | {"rope_type": "default", "mrope_interleaved": True}
    text |= {"head_dim": config["hidden_size"] // config["num_attention_heads"], "model_type": "qwen3_vl_text"}
    top = {k: config[k] for k in outer} | {"text_config": text}
    top |= {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl"}
    own = {
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0],
    }
    dropped = ("window_size", "fullatt_block_indexes", "tokens_per_second")
    kept = {k: v for k, v in vision.items() if k not in dropped}
    return top, kept | own


def _as_qwen3_5(config: dict[str, Any], vision: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same sizes as Qwen3.5: a linear layer and a full one, of whose heads a quarter rotates."""
    top, vision = _as_qwen3(config, vision)
    text = {k: v for k, v in top["text_config"].items() if k not in ("rope_scaling", "rope_theta")}
    text |= {"model_type": "qwen3_5_text", "head_dim": 32, "full_attention_interval": 2}
    text |= {f"linear_num_{part}_heads": n for part, n in (("key", 2), ("value", 4))}
    text |= {f"linear_{part}_head_dim": 8 for part in ("key", "value")}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    text["rope_parameters"] |= {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    top |= {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": text}
    return top, {k: v for k, v in vision.items() if k != "deepstack_visual_indexes"}


def _write(path: pathlib.Path, **values: Any) -> None:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
