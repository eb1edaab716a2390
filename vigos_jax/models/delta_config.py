"""Dimensions of gated delta rule layers, and which layers of a hybrid decoder are such layers."""

import dataclasses

from vigos_jax.models.config_fields import Section

CHUNK = 64  # branches of packed rows start at multiples of this; at most as many tokens are computed together
LINEAR, FULL = "linear", "full"  # kinds of layers
_KINDS = {"linear_attention": LINEAR, "full_attention": FULL}  # as config.json has them


@dataclasses.dataclass(frozen=True)
class DeltaConfig:
    """Dimensions of a gated delta rule layer.

    Attributes:
      key_heads, value_heads: each key head serves value_heads / key_heads value heads, beside each other.
      key_dim, value_dim: sizes of one head.
      conv_width: tokens that the causal convolution reads, its own included.
      chunk: packed branches start at multiples of it.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    chunk: int = CHUNK

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values side by side."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def width(self) -> int:
        """Features that a layer's heads give together."""
        return self.value_heads * self.value_dim


def parse_delta(text: Section) -> DeltaConfig:
    """The dimensions in a `text_config`; ValueError where they contradict each other."""
    config = DeltaConfig(
        key_heads=text.whole("linear_num_key_heads"),
        value_heads=text.whole("linear_num_value_heads"),
        key_dim=text.whole("linear_key_head_dim"),
        value_dim=text.whole("linear_value_head_dim"),
        conv_width=text.whole("linear_conv_kernel_dim", most=CHUNK),
    )
    if config.value_heads % config.key_heads:
        raise ValueError(
            f"linear_num_value_heads {config.value_heads} must be a multiple of linear_num_key_heads {config.key_heads}"
        )
    return config


def layer_pattern(text: Section, num_layers: int) -> tuple[str, ...]:
    """The shortest run of layer kinds whose repetition gives all layers.

    `layer_types` says it layer by layer; without it, every `full_attention_interval`-th layer (4 by default) is full.
    """
    types = text.values.get("layer_types")
    if types is None:
        interval = text.whole("full_attention_interval") if "full_attention_interval" in text.values else 4
        types = [f"{FULL if (i + 1) % interval == 0 else LINEAR}_attention" for i in range(num_layers)]
    if not isinstance(types, list | tuple) or len(types) != num_layers or not all(t in _KINDS for t in types):
        raise ValueError(f"layer_types must name one of {', '.join(_KINDS)} for each of the {num_layers} layers")
    kinds = tuple(_KINDS[t] for t in types)
    periods = (n for n in range(1, num_layers + 1) if num_layers % n == 0)
    return next(kinds[:n] for n in periods if kinds[:n] * (num_layers // n) == kinds)
