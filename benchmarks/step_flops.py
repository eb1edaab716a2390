"""Floating point operations of a distillation step by phase, counted from sizes: products, and attention's pairs.

They are what the definition asks for, whoever computes it; padding, recomputation and element-wise operations are left
out.
"""

import dataclasses
from collections.abc import Sequence

from vigos_jax.models.config import ModelConfig, VisionConfig


@dataclasses.dataclass(frozen=True)
class StepShape:
    """Sizes of one row's step.

    Attributes:
      patches, prompt, completion: of the row; the prompt has the visual tokens.
      encodings: how often the vision tower runs behind the rollout's.
      teachers: (tokens read before, new tokens) of each sequence that a teacher runs on.
      supervised: tokens of the loss.
    """

    patches: int
    prompt: int
    completion: int
    encodings: int
    teachers: tuple[tuple[int, int], ...]
    supervised: int


def phases(config: ModelConfig, rank: int, shape: StepShape) -> dict[str, float]:
    """FLOPs by phase: encode, prefill and decode are the rollout's; then the update's.

    The student's backward pass is one product for each of the forward's, the frozen weights have no gradient, and two
    for each of adapters and attention. The head's products: both logits, and the gradient of the student's states.

    Args:
      rank: of adapters on all seven products of a decoder layer.
    """
    n, c = shape.prompt, shape.completion
    dense, adapter, head = _layers(config), _adapters(config, rank), 2 * config.hidden_size * config.vocab_size
    encode = _vision(config.vision, shape.patches)
    whole, own = n + c, _attention(config, 0, n + c)
    return {
        "encode": encode,
        "prefill": n * (dense + adapter) + _attention(config, 0, n) + head,
        "decode": c * (dense + adapter + head) + _attention(config, n, c),
        "encode again": shape.encodings * encode,
        "student, backward": whole * (2 * dense + 3 * adapter) + 3 * own,
        "teachers": sum(new * dense + _attention(config, read, new) for read, new in shape.teachers),
        "heads": 3 * shape.supervised * head,
    }


ROLLOUT = ("encode", "prefill", "decode")


def shares(counted: dict[str, float]) -> str:
    """For a table: the whole, and each phase's share."""
    whole = sum(counted.values())
    return f"{whole / 1e9:.1f} GFLOP a row: " + ", ".join(f"{k} {v / whole:.0%}" for k, v in counted.items() if v)


def branches(segment_ids: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """`StepShape.teachers` of a packed row: the prefix (1), then each branch behind it; 0 is padding."""
    ids = [int(i) for i in segment_ids]
    prefix = ids.count(1)
    return ((0, prefix), *((prefix, ids.count(i)) for i in range(2, max(ids) + 1)))


def _projections(c: ModelConfig) -> list[tuple[int, int]]:
    d, q, kv, f = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
    return [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]


def _layers(c: ModelConfig) -> float:
    return 2 * c.num_layers * sum(a * b for a, b in _projections(c))


def _adapters(c: ModelConfig, rank: int) -> float:
    return 2 * c.num_layers * rank * sum(a + b for a, b in _projections(c))


def _attention(c: ModelConfig, read: int, new: int) -> float:
    """Logits and weighted sum of new tokens that see those read before, themselves and each other causally."""
    return 4 * c.num_layers * c.num_heads * c.head_dim * (new * read + new * (new + 1) / 2)


def _vision(v: VisionConfig, patches: int) -> float:
    block = 2 * (4 * v.hidden_size**2 + 3 * v.hidden_size * v.intermediate_size)
    full = len(v.full_attention_blocks) if v.window_size else v.depth
    keys = full * patches + (v.depth - full) * v.window_patches
    merged = v.merge_unit * v.hidden_size
    merger = 2 * (merged**2 + merged * v.out_hidden_size) / v.merge_unit
    return patches * (2 * v.patch_dim * v.hidden_size + v.depth * block + 4 * v.hidden_size * keys + merger)
