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
from vigos_jax.models.config_fields import Section
from vigos_jax.models.delta_config import FULL, DeltaConfig, layer_pattern, parse_delta
from vigos_jax.runtime.files import read_object

MAX_LAYERS = 1024
# Relatives of supported families that differ in more than their sizes.
_NAMED = {
    "qwen3_5_moe": "Qwen3.5-MoE (model_type 'qwen3_5_moe'), whose MLPs are mixtures of experts,",
    "qwen3_5_text": "Qwen3.5 without its vision tower (model_type 'qwen3_5_text')",
    "qwen3_vl_moe": "Qwen3-VL-MoE (model_type 'qwen3_vl_moe'), whose MLPs are mixtures of experts,",
}


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
        """Patches of one visual token."""
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
    norm_offset: float = 0.0  # added to the weights of the decoder's norms
    attention_gate: bool = False  # q_proj gives each head a gate beside its query; sigmoid(gate) scales its output
    layer_pattern: tuple[str, ...] = (FULL,)  # kinds of the layers of one group; the decoder repeats it
    delta: DeltaConfig | None = None  # of linear layers
    wraps_videos: bool = False  # frames of a video stand together inside one pair of vision tokens

    @property
    def groups(self) -> int:
        """How often the decoder repeats `layer_pattern`."""
        return self.num_layers // len(self.layer_pattern)

    @property
    def attention_layers(self) -> int:
        """Layers that keep keys and values."""
        return self.groups * self.layer_pattern.count(FULL)

    @property
    def chunk(self) -> int:
        """Packed branches start at multiples of this many tokens; 1 if only attention reads earlier tokens."""
        return self.delta.chunk if self.delta is not None else 1

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
        if isinstance(family, str) and family in _NAMED:
            raise InputError(f"{where}: {_NAMED[family]} is not supported; choices: {', '.join(PARSERS)}")
        if not isinstance(family, str) or family not in PARSERS:
            raise InputError(f"{where}: model_type {family!r} is not supported; choices: {', '.join(PARSERS)}")
        _check_precision(raw, where)
        return PARSERS[family](raw, where)


def _check_precision(raw: Mapping[str, Any], where: str) -> None:
    """Raises InputError if `config.json` declares quantised weights."""
    for section in (raw, raw.get("text_config")):
        for field in ("quantization_config", "compression_config"):
            value = section.get(field) if isinstance(section, Mapping) else None
            if value is None:
                continue
            method = value.get("quant_method", "unnamed") if isinstance(value, Mapping) else value
            raise InputError(
                f"{where}: {field} says that the weights are quantised ({method}), which is not supported; choices: "
                f"the model they were quantised from, or, if they are full precision, config.json without {field}"
            )


def _mrope_section(rope: Section) -> tuple[int, int, int]:
    sections = rope.wholes("mrope_section", least=1)
    if len(sections) != 3:
        raise ValueError(f"mrope_section {sections} must be three numbers")
    return sections[0], sections[1], sections[2]


@dataclasses.dataclass(frozen=True)
class DecoderTraits:
    """What tells a family with the shared decoder from the others; see `ModelConfig`.

    Attributes:
      parse_vision: reads the family's `vision_config`.
      vision_act: the activation of the tower's MLPs.
      may_be_flat: the decoder's fields may lie at the top level; their `tie_word_embeddings` may lie among them.
      has_head_dim: the head size is a field of its own, not the hidden size over the number of heads.
      is_hybrid: some layers are gated delta rule layers; full ones have an output gate, and part of a head rotates.
    """

    parse_vision: Callable[[Section], VisionConfig]
    vision_act: str
    may_be_flat: bool
    has_head_dim: bool
    qkv_bias: bool
    qk_norm: bool
    mrope_interleaved: bool
    norm_offset: float = 0.0
    is_hybrid: bool = False
    wraps_videos: bool = False


def parse_decoder(raw: Mapping[str, Any], where: str, *, family: str, traits: DecoderTraits) -> ModelConfig:
    """The config of a family whose decoder is the shared one. raw, where: see `ModelConfig.from_hf`."""
    try:
        top = Section(raw, family)
        text, rope = _text_and_rope(top, traits)
        vision = top.section("vision_config")
        heads = text.whole("num_attention_heads")
        num_layers = text.whole("num_hidden_layers", most=MAX_LAYERS)
        config = ModelConfig(
            family=family,
            hidden_size=text.whole("hidden_size"),
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=heads if text.get("num_key_value_heads") is None else text.whole("num_key_value_heads"),
            head_dim=text.whole("head_dim") if traits.has_head_dim else text.whole("hidden_size") // heads,
            intermediate_size=text.whole("intermediate_size"),
            vocab_size=text.whole("vocab_size"),
            rope_theta=(rope if "rope_theta" in rope.values else text).positive("rope_theta"),
            mrope_section=_mrope_section(rope),
            rms_eps=text.positive("rms_norm_eps"),
            # transformers looks at the top level; only in flat folders at a nested flag too.
            tie_embeddings=top.flag("tie_word_embeddings")
            or (traits.may_be_flat and "tie_word_embeddings" in text.values and text.flag("tie_word_embeddings")),
            image_token_id=top.whole("image_token_id", least=0),
            video_token_id=top.whole("video_token_id", least=0),
            vision=traits.parse_vision(vision),
            qkv_bias=traits.qkv_bias,
            qk_norm=traits.qk_norm,
            mrope_interleaved=traits.mrope_interleaved,
            norm_offset=traits.norm_offset,
            attention_gate=traits.is_hybrid,
            layer_pattern=layer_pattern(text, num_layers) if traits.is_hybrid else (FULL,),
            delta=parse_delta(text) if traits.is_hybrid else None,
            wraps_videos=traits.wraps_videos,
        )
        _check_sizes(config, rotary=_rotary_dims(config, text, rope) if traits.is_hybrid else config.head_dim)
        _check_computation(config, text, rope, vision, traits)
    except KeyError as e:
        raise InputError(f"{where}: field {e} is missing, and has no default; the model needs it") from e
    except ValueError as e:
        raise InputError(f"{where}: {e}") from e
    return config


def _text_and_rope(top: Section, traits: DecoderTraits) -> tuple[Section, Section]:
    """The decoder's fields and those of its rotary embedding. Of two layouts in one file transformers reads the nested.

    The rotary fields have no defaults but for `rope_theta`, which older files keep beside them.
    """
    if top.values.get("text_config") is not None:
        text = top.section("text_config")
    elif traits.may_be_flat:
        text = Section(top.values, top.model_type, "text_config")
    else:
        raise KeyError("text_config")
    return text, Section(text.object_("rope_scaling") or text.object_("rope_parameters"), "", "")


def _check_computation(
    config: ModelConfig, text: Section, rope: Section, vision: Section, traits: DecoderTraits
) -> None:
    """Raises ValueError where a file asks for a computation that this program does not have."""
    types = text.values.get("layer_types") or []
    other_types = [t for t in (types if isinstance(types, list) else [types]) if t != "full_attention"]
    other_types = [] if traits.is_hybrid else other_types
    for field, value, choices in (
        ("hidden_act", text.get("hidden_act"), ("silu",)),
        ("vision_config.hidden_act", vision.get("hidden_act"), (traits.vision_act,)),
        ("rope_type", rope.values.get("rope_type", rope.values.get("type", "default")), ("default", "mrope")),
        ("vision_config's rope_theta", vision.object_("rope_parameters").get("rope_theta", 1e4), (1e4,)),
        ("use_sliding_window", text.values.get("use_sliding_window") or False, (False,)),
        ("layer_types", [*other_types, "full_attention"][0], ("full_attention",)),
        ("attention_bias", not traits.qkv_bias and bool(text.values.get("attention_bias")), (False,)),
        ("head_dim", text.values.get("head_dim") or config.head_dim, (config.head_dim,)),
    ):
        if value not in choices:
            words = ", ".join(c if isinstance(c, str) else json.dumps(c) for c in choices)
            raise ValueError(f"{field}={json.dumps(value)} is not supported; choices: {words}")


def _rotary_dims(config: ModelConfig, text: Section, rope: Section) -> int:
    """Dimensions of a head that rotate."""
    section = rope if "partial_rotary_factor" in rope.values else text
    return int(config.head_dim * section.positive("partial_rotary_factor"))


def _check_sizes(config: ModelConfig, *, rotary: int) -> None:
    """Raises ValueError where dimensions contradict each other. rotary: dimensions of a head that rotate."""
    vision = config.vision
    if max(config.visual_ids) >= config.vocab_size:
        raise ValueError(
            f"image_token_id and video_token_id {config.visual_ids} must be below vocab_size {config.vocab_size}"
        )
    for what, n, parts in (
        ("num_attention_heads and num_key_value_heads", config.num_heads, config.num_kv_heads),
        ("vision_config's hidden_size and num_heads", vision.hidden_size, vision.num_heads),
    ):
        if n % parts:
            raise ValueError(f"{what} {n} and {parts}: the first must be a multiple of the second")
    if 2 * sum(config.mrope_section) != rotary:
        what = "the head size" if rotary == config.head_dim else f"what rotates of the head size {config.head_dim}:"
        raise ValueError(f"mrope_section {config.mrope_section} must be three numbers that sum to half {what} {rotary}")
    if vision.out_hidden_size != config.hidden_size:
        raise ValueError(
            f"vision_config's out_hidden_size {vision.out_hidden_size} must be the decoder's hidden_size "
            f"{config.hidden_size}"
        )


def _common_vision(vision: Section) -> dict[str, Any]:
    return {
        "depth": vision.whole("depth", most=MAX_LAYERS),
        "hidden_size": vision.whole("hidden_size"),
        "num_heads": vision.whole("num_heads"),
        "intermediate_size": vision.whole("intermediate_size"),
        "out_hidden_size": vision.whole("out_hidden_size"),
        "patch_size": vision.whole("patch_size"),
        "temporal_patch_size": vision.whole("temporal_patch_size"),
        "spatial_merge_size": vision.whole("spatial_merge_size"),
        "in_channels": vision.whole("in_channels"),  # `in_chans` of published files is unused
    }


def _qwen2_5_vision(vision: Section) -> VisionConfig:
    return VisionConfig(
        **_common_vision(vision),
        window_size=vision.whole("window_size"),
        full_attention_blocks=vision.wholes("fullatt_block_indexes"),
        tokens_per_second=vision.positive("tokens_per_second"),
    )


def _qwen3_vision(vision: Section, *, has_deepstack: bool) -> VisionConfig:
    num_positions = vision.whole("num_position_embeddings")
    blocks = vision.wholes("deepstack_visual_indexes") if has_deepstack else ()
    if round(num_positions**0.5) ** 2 != num_positions:
        raise ValueError(f"num_position_embeddings {num_positions} must be a square number")
    if len(set(blocks)) < len(blocks) or not all(i < vision.whole("depth") for i in blocks):
        raise ValueError(f"deepstack_visual_indexes {blocks} must be different blocks of the tower")
    return VisionConfig(**_common_vision(vision), num_positions=num_positions, deepstack_blocks=blocks)


_QWEN2_5 = DecoderTraits(
    _qwen2_5_vision,
    vision_act="silu",
    may_be_flat=True,
    has_head_dim=False,
    qkv_bias=True,
    qk_norm=False,
    mrope_interleaved=False,
)
_QWEN3 = DecoderTraits(
    functools.partial(_qwen3_vision, has_deepstack=True),
    vision_act="gelu_pytorch_tanh",
    may_be_flat=False,
    has_head_dim=True,
    qkv_bias=False,
    qk_norm=True,
    mrope_interleaved=True,
)
_QWEN3_5 = dataclasses.replace(
    _QWEN3, parse_vision=functools.partial(_qwen3_vision, has_deepstack=False), norm_offset=1.0, is_hybrid=True,
    wraps_videos=True,
)  # fmt: skip
# model_type -> (parsed config.json, its path) -> ModelConfig. Here and not beside the towers: data workers read
# config.json, too, and need not import flax.
PARSERS: dict[str, Callable[[Mapping[str, Any], str], ModelConfig]] = {
    name: functools.partial(parse_decoder, family=name, traits=traits)
    for name, traits in (("qwen2_5_vl", _QWEN2_5), ("qwen3_vl", _QWEN3), ("qwen3_5", _QWEN3_5))
}
