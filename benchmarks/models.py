"""The models and samples that are measured: 3B shapes, allocated only on accelerators, and 100 M random parameters."""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vigos_jax.data.processor import EncodedImage, Turn
from vigos_jax.method.batch import ScoreBatch
from vigos_jax.method.losses import ObjectiveConfig, loss_weights, normalizer_terms, weighted_loss
from vigos_jax.method.packing import Buckets
from vigos_jax.method.roles import TeacherRole
from vigos_jax.method.rows import Rollout, Row
from vigos_jax.method.scoring import supervised_states
from vigos_jax.method.spans import Spans
from vigos_jax.models.attention import choose
from vigos_jax.models.config import ModelConfig, VisionConfig
from vigos_jax.models.layers import LoraSpec
from vigos_jax.models.tensor_names import LANGUAGE_PROJECTIONS
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables

IMAGE, VISION_START, VISION_END = 2, 0, 1  # ids; text starts at 3

QWEN_3B = ModelConfig(
    family="qwen2_5_vl", hidden_size=2048, num_layers=36, num_heads=16, num_kv_heads=2, head_dim=128,
    intermediate_size=11008, vocab_size=151_936, rope_theta=1e6, mrope_section=(16, 24, 24), rms_eps=1e-6,
    tie_embeddings=True, image_token_id=IMAGE, video_token_id=3,
    vision=VisionConfig(
        depth=32, hidden_size=1280, num_heads=16, intermediate_size=3420, out_hidden_size=2048,
        window_size=112, full_attention_blocks=(7, 15, 23, 31),
    ),
)  # fmt: skip

MID_SIZE = ModelConfig(
    family="qwen2_5_vl", hidden_size=640, num_layers=12, num_heads=10, num_kv_heads=2, head_dim=64,
    intermediate_size=2560, vocab_size=32_768, rope_theta=1e6, mrope_section=(8, 12, 12), rms_eps=1e-6,
    tie_embeddings=True, image_token_id=IMAGE, video_token_id=3,
    vision=VisionConfig(
        depth=8, hidden_size=320, num_heads=5, intermediate_size=864, out_hidden_size=640,
        window_size=112, full_attention_blocks=(3, 7),
    ),
)  # fmt: skip

LORA = LoraSpec(rank=64, scale=2.0, language=frozenset(LANGUAGE_PROJECTIONS))

# The paper's three roles; prompts are given as ids.
ROLES = (
    TeacherRole("perception", "", "", ("description",), "valid", "forward_kl", 1.0, 0.05),
    TeacherRole("reasoning", "", "", ("reasoning", "answer"), "valid", "forward_kl", 1.0, 0.05),
    TeacherRole("reference", "", "", ("completion",), "invalid", "reverse_kl", 2.0, 0.05),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Tokens of a sample. The image is `grid` patches; the turns of student, reasoning and reference are so long."""

    grid: tuple[int, int]
    prompt: int
    privileged: int
    description: int
    reasoning: int

    @property
    def completion(self) -> int:
        return self.description + self.reasoning


TYPICAL = Sizes(grid=(40, 70), prompt=200, privileged=240, description=120, reasoning=200)  # 700 visual tokens
THIRD = Sizes(grid=(30, 32), prompt=67, privileged=80, description=40, reasoning=67)  # the same at a third


def model(config: ModelConfig, *, remat: str = "none", dtype=jnp.float32) -> VisionLanguageModel:
    attention = choose("auto", platform=jax.default_backend(), dtype=dtype)
    return VisionLanguageModel(config, lora=LORA, remat=remat, dtype=dtype, attention=attention)


@functools.cache
def weights(config: ModelConfig) -> dict:
    """Random `params` and `lora` of `model(config)`, float32; B is not zero."""

    def draw(path, leaf):
        rng = np.random.default_rng(_seed(path))
        return jnp.asarray(_scaled(path, leaf, rng.standard_normal(leaf.shape, np.float32)))

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(model(config)))


def weights_on_device(config: ModelConfig) -> dict:
    """As `weights`, drawn where they are used: bfloat16 `params`, float32 `lora`; other numbers on another device."""

    @functools.partial(jax.jit, static_argnums=0)
    def draw(path, key):
        leaf = leaves[path]
        dtype = jnp.bfloat16 if "params" in jax.tree_util.keystr(path[:1]) else jnp.float32
        return _scaled(path, leaf, jax.random.normal(key, leaf.shape, jnp.float32)).astype(dtype)

    flat, tree = jax.tree_util.tree_flatten_with_path(abstract_variables(model(config)))
    leaves = dict(flat)
    return jax.tree.unflatten(tree, [draw(path, jax.random.key(_seed(path))) for path, _ in flat])


def _seed(path: tuple) -> int:
    return zlib.crc32(jax.tree_util.keystr(path).encode())


def _scaled(path: tuple, leaf: Any, x: Any) -> Any:
    """Standard normal numbers as weights: norms near 1, products that keep the size of their input."""
    name = jax.tree_util.keystr(path)
    if "scale" in name:
        return 1 + 0.1 * x
    if "bias" in name:
        return 0.1 * x
    return x * (0.5 if "embedding" in name else leaf.shape[-2] ** -0.5)


def samples(config: ModelConfig, sizes: Sizes, *, rows: int, invalid: int = 0) -> tuple[list[Row], list[Rollout]]:
    """Random rows of one size; the last `invalid` rollouts break the format."""
    rng = np.random.default_rng(0)
    words = lambda n: tuple(int(i) for i in rng.integers(3, config.vocab_size, n))  # noqa: E731
    h, w = sizes.grid
    out_rows, rollouts = [], []
    for i in range(rows):
        patches = rng.standard_normal((h * w, config.vision.patch_dim), np.float32)
        prefix = (*words(4), VISION_START, *[IMAGE] * (h * w // config.vision.merge_unit), VISION_END)
        lengths = (sizes.prompt, 10, sizes.privileged, sizes.privileged)  # student, perception, reasoning, reference
        student, *teachers = (Turn(prefix, words(n)) for n in lengths)
        out_rows.append(Row((EncodedImage(patches, (1, h, w)),), student, tuple(teachers)))
        n, d = sizes.completion, sizes.description
        spans = Spans(True, (0, d), (d, n - 4), (n - 4, n), None)
        if i >= rows - invalid:
            spans = Spans(False, (0, 0), (0, 0), (0, 0), "no_box")
        rollouts.append(Rollout(words(n), spans))
    return out_rows, rollouts


def exact_buckets(config: ModelConfig) -> Buckets:
    """Sizes that leave little padding: what is compared is the design, not the buckets."""
    steps = tuple(range(16, 16384, 16))
    unit = config.vision.window_patches
    return Buckets(patches=tuple(range(unit, 64 * unit, unit)), prompt=steps, completion=steps, sequence=steps)


def loss(
    model: VisionLanguageModel, base: Any, trained: Any, batch: ScoreBatch, objective: ObjectiveConfig
) -> jax.Array:
    """The loss of one batch, as the train step has it."""
    normalizers = jnp.sum(normalizer_terms(batch.supervised, objective), (0, 1))
    weights = loss_weights(batch.supervised, normalizers, objective)
    states = supervised_states(model, base, trained, batch)
    return weighted_loss(states, batch.supervised, weights, objective, trains_head="params" in trained)[0]
