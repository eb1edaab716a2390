"""What a checkpoint's `config.json` says about its model, as frozen dataclasses.

Both layouts that Hugging Face folders use are read: the flat one of the published Qwen2.5-VL checkpoints and the
nested one (`text_config`) of Qwen3-VL and of what newer transformers versions write.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from vigos_jax.errors import InputError
from vigos_jax.runtime.files import read_object

MAX_SIZE = 2**24  # no published dimension is near it; what is larger would only fail later, for lack of memory
MAX_LAYERS = 1024


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Dimensions of the vision tower. Sizes in pixels or patches as named."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    patch_size: int = 14  # pixels
    temporal_patch_size: int = 2  # frames
    spatial_merge_size: int = 2  # patches along a side of one visual token
    in_channels: int = 3
    window_size: int = 0  # pixels; 0 for a tower without windows
    full_attention_blocks: tuple[int, ...] = ()  # of a tower with windows
    tokens_per_second: float = 0.0  # temporal positions of a video; 0 where its frames are told apart by text
    num_positions: int = 0  # learned positions, a square table; 0 for none
    deepstack_blocks: tuple[int, ...] = ()  # whose states the first decoder layers receive too, in this order

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches behind one visual token."""
        return self.spatial_merge_size**2

    @property
    def window_side(self) -> int:
        """Visual tokens along a side of one attention window; 1 without windows, so that slots are in reading order."""
        return max(1, self.window_size // self.patch_size // self.spatial_merge_size)

    @property
    def window_patches(self) -> int:
        """Patches in one full attention window."""
        return self.window_side**2 * self.merge_unit


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a vision-language model."""

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    mrope_section: tuple[int, int, int]  # rotary frequencies for time, height, width
    rms_eps: float
    tie_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision: VisionConfig
    qkv_bias: bool = True
    qk_norm: bool = False  # RMSNorm of every query and key head
    mrope_interleaved: bool = False  # see layers.mrope_angles

    @property
    def visual_ids(self) -> tuple[int, int]:
        """The tokens that stand for pieces of images and of videos."""
        return self.image_token_id, self.video_token_id

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> "ModelConfig":
        """Reads `folder/config.json`.

        Raises:
          InputError: the file is missing, is not a JSON object, or describes an unsupported model.
        """
        path = pathlib.Path(folder) / "config.json"
        raw = read_object(path, owner="a model folder")
        return cls.from_hf(raw, where=str(path))

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], *, where: str = "config.json") -> "ModelConfig":
        """Converts the parsed `config.json` of a Hugging Face folder, by the parser of its model_type."""
        family = raw.get("model_type")
        if not isinstance(family, str) or family not in PARSERS:
            raise InputError(f"{where}: model_type {family!r} is not supported; choices: {', '.join(PARSERS)}")
        return PARSERS[family](raw, where)


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{key} must be an object, not {value!r}")
    return value or {}


def _whole(
    values: Mapping[str, Any], key: str, *, default: int | None = None, least: int = 1, most: int = MAX_SIZE
) -> int:
    value = values.get(key)
    if value is None:
        if default is None:
            raise KeyError(key)
        value = default
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{key} {value!r} must be a whole number from {least} to {most}")
    return value


def _wholes(values: Mapping[str, Any], key: str, *, default: tuple[int, ...] = (), least: int = 0) -> tuple[int, ...]:
    value = values.get(key, default)
    if not isinstance(value, list | tuple):
        raise ValueError(f"{key} {value!r} must be a list of whole numbers")
    return tuple(_whole({key: n}, key, least=least) for n in value)


def _sections(rope: Mapping[str, Any]) -> tuple[int, int, int]:
    sections = _wholes(rope, "mrope_section", least=1)
    if len(sections) != 3:
        raise ValueError(f"mrope_section {sections} must be three numbers")
    return sections[0], sections[1], sections[2]


def _positive(values: Mapping[str, Any], key: str, default: float) -> float:
    value = default if values.get(key) is None else values[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e30:
        raise ValueError(f"{key} {value!r} must be a positive number")
    return float(value)


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key} {value!r} must be true or false")
    return bool(value)


@dataclasses.dataclass(frozen=True)
class DecoderTraits:
    """What tells a family with the shared decoder from the others; see `ModelConfig`.

    Attributes:
      parse_vision: reads the family's `vision_config`.
      rope_theta: where the file has none.
    """

    parse_vision: Callable[[Mapping[str, Any]], VisionConfig]
    rope_theta: float
    qkv_bias: bool
    qk_norm: bool
    mrope_interleaved: bool


def parse_decoder(raw: Mapping[str, Any], where: str, *, family: str, traits: DecoderTraits) -> ModelConfig:
    """The config of a family whose decoder is the shared one. raw, where: see `ModelConfig.from_hf`."""
    try:
        text = {**raw, **_section(raw, "text_config")}
        rope = _section(text, "rope_parameters") or _section(text, "rope_scaling")
        heads = _whole(text, "num_attention_heads")
        config = ModelConfig(
            family=family,
            hidden_size=_whole(text, "hidden_size"),
            num_layers=_whole(text, "num_hidden_layers", most=MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=_whole(text, "num_key_value_heads"),
            head_dim=_whole(text, "head_dim", default=_whole(text, "hidden_size") // heads),
            intermediate_size=_whole(text, "intermediate_size"),
            vocab_size=_whole(text, "vocab_size"),
            rope_theta=_positive(rope if rope.get("rope_theta") else text, "rope_theta", traits.rope_theta),
            mrope_section=_sections(rope),
            rms_eps=_positive(text, "rms_norm_eps", 1e-6),
            # transformers reads the top level; a nested copy may be stale.
            tie_embeddings=_flag(raw if "tie_word_embeddings" in raw else text, "tie_word_embeddings"),
            image_token_id=_whole(raw, "image_token_id", least=0),
            video_token_id=_whole(raw, "video_token_id", least=0),
            vision=traits.parse_vision(_section(raw, "vision_config")),
            qkv_bias=traits.qkv_bias,
            qk_norm=traits.qk_norm,
            mrope_interleaved=traits.mrope_interleaved,
        )
    except (KeyError, ValueError) as e:
        raise InputError(f"{where}: missing or malformed field: {e!r}") from e
    _check_sizes(config, where)
    for field, value, choices in (
        ("hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), ("default", "mrope")),
        ("use_sliding_window", text.get("use_sliding_window") or False, (False,)),
        ("attention_bias", not traits.qkv_bias and bool(text.get("attention_bias")), (False,)),
    ):
        if value not in choices:
            words = ", ".join(c if isinstance(c, str) else json.dumps(c) for c in choices)
            raise InputError(f"{where}: {field}={json.dumps(value)} is not supported; choices: {words}")
    return config


def _check_sizes(config: ModelConfig, where: str) -> None:
    """Raises InputError where dimensions contradict each other."""
    if max(config.visual_ids) >= config.vocab_size:
        raise InputError(
            f"{where}: image_token_id and video_token_id {config.visual_ids} must be below vocab_size "
            f"{config.vocab_size}"
        )
    for what, n, parts in (
        ("num_attention_heads and num_key_value_heads", config.num_heads, config.num_kv_heads),
        ("vision_config's hidden_size and num_heads", config.vision.hidden_size, config.vision.num_heads),
    ):
        if n % parts:
            raise InputError(f"{where}: {what} {n} and {parts}: the first must be a multiple of the second")
    if 2 * sum(config.mrope_section) != config.head_dim:
        raise InputError(
            f"{where}: mrope_section {config.mrope_section} must be three numbers that sum to half the head size "
            f"{config.head_dim}"
        )


def _common_vision(vision: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "depth": _whole(vision, "depth", most=MAX_LAYERS),
        "hidden_size": _whole(vision, "hidden_size"),
        "num_heads": _whole(vision, "num_heads"),
        "intermediate_size": _whole(vision, "intermediate_size"),
        "out_hidden_size": _whole(vision, "out_hidden_size"),
        "temporal_patch_size": _whole(vision, "temporal_patch_size", default=2),
        "spatial_merge_size": _whole(vision, "spatial_merge_size", default=2),
        "in_channels": _whole(vision, "in_channels", default=_whole(vision, "in_chans", default=3)),
    }


def _qwen2_5_vision(vision: Mapping[str, Any]) -> VisionConfig:
    return VisionConfig(
        **_common_vision(vision),
        patch_size=_whole(vision, "patch_size", default=14),
        window_size=_whole(vision, "window_size", default=112),
        full_attention_blocks=_wholes(vision, "fullatt_block_indexes"),
        tokens_per_second=_positive(vision, "tokens_per_second", 4),
    )


def _qwen3_vision(vision: Mapping[str, Any]) -> VisionConfig:
    num_positions = _whole(vision, "num_position_embeddings", default=2304)
    blocks = _wholes(vision, "deepstack_visual_indexes", default=(8, 16, 24))
    if round(num_positions**0.5) ** 2 != num_positions:
        raise ValueError(f"num_position_embeddings {num_positions} must be a square number")
    if len(set(blocks)) < len(blocks) or not all(i < _whole(vision, "depth") for i in blocks):
        raise ValueError(f"deepstack_visual_indexes {blocks} must be different blocks of the tower")
    return VisionConfig(
        **_common_vision(vision),
        patch_size=_whole(vision, "patch_size", default=16),
        num_positions=num_positions,
        deepstack_blocks=blocks,
    )


# model_type -> (parsed config.json, its path) -> ModelConfig. Here and not beside the towers: data workers read
# config.json, too, and need not import flax.
PARSERS: dict[str, Callable[[Mapping[str, Any], str], ModelConfig]] = {
    "qwen2_5_vl": functools.partial(
        parse_decoder,
        family="qwen2_5_vl",
        traits=DecoderTraits(_qwen2_5_vision, rope_theta=1e6, qkv_bias=True, qk_norm=False, mrope_interleaved=False),
    ),
    "qwen3_vl": functools.partial(
        parse_decoder,
        family="qwen3_vl",
        traits=DecoderTraits(_qwen3_vision, rope_theta=5e6, qkv_bias=False, qk_norm=True, mrope_interleaved=True),
    ),
}
