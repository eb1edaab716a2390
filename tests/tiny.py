"""A tiny random model, and synthetic rows and rollouts of plain arrays: no tokenizer, no files.

Weights are drawn so that logits differ by several units: with the usual initialisation a tiny model is almost
uniform, and comparisons of its outputs would pass whatever they compare.
"""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import base
from vigos_jax.data.processor import EncodedImage, Turn
from vigos_jax.method.losses import ObjectiveConfig
from vigos_jax.method.packing import Buckets, pack_scores
from vigos_jax.method.roles import TeacherRole
from vigos_jax.method.rows import Rollout, Row
from vigos_jax.method.scoring import NO_OTHERS, score_batch
from vigos_jax.method.spans import Spans
from vigos_jax.models.config import ModelConfig, VisionConfig
from vigos_jax.models.layers import LoraSpec
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.training.step import TrainState, make_train_step

WORDS = 120  # ids below are text; above stand the control tokens
IMAGE, VISION_START, VISION_END, TURN = 120, 121, 122, 123


RULES = base.get_config().mesh.rules

# Every size that a mesh axis may split is a multiple of 8.
CONFIG = ModelConfig(
    family="qwen2_5_vl",
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    vocab_size=128,
    rope_theta=1e4,
    mrope_section=(1, 1, 2),
    rms_eps=1e-6,
    tie_embeddings=False,
    image_token_id=IMAGE,
    video_token_id=124,
    vision=VisionConfig(
        depth=2,
        hidden_size=32,
        num_heads=2,
        intermediate_size=48,
        out_hidden_size=32,
        patch_size=4,
        window_size=16,
        full_attention_blocks=(1,),
    ),
)
LORA = LoraSpec(
    rank=8,
    scale=2.0,
    language=frozenset(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
)
MODEL = VisionLanguageModel(CONFIG, lora=LORA)
# One size each: all batches of equal length share one compiled program.
BUCKETS = Buckets(patches=(64,), prompt=(40,), completion=(16,), sequence=(56, 144))

# The three roles of the method. The clips lie among the divergences of this model: some entries are clipped.
ROLES = (
    TeacherRole("perception", "", "", ("description",), "valid", "forward_kl", 1.0, 1.3),
    TeacherRole("reasoning", "", "", ("reasoning", "answer"), "valid", "forward_kl", 1.0, 1.8),
    TeacherRole("reference", "", "", ("completion",), "invalid", "reverse_kl", 2.0, 1.5),
)


def random_variables(model: VisionLanguageModel, *, seed: int = 0, adapter: float = 0.3) -> dict:
    """Float32 `params`, and `lora` if the model has adapters, with B of size `adapter` (0: as before training)."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        x = rng.standard_normal(leaf.shape)
        if "scale" in name:
            x = 1 + 0.1 * x
        elif "bias" in name:
            x = 0.2 * x
        elif "lora" in name and name.endswith("['b']"):
            x = adapter * x * leaf.shape[-2] ** -0.5
        else:  # kernels [..., in, out]; the embedding is read by rows
            x = x * (1 if "embedding" in name else leaf.shape[-2] ** -0.5) * (2 if "lm_head" in name else 1)
        return jnp.asarray(x, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(model))


@functools.cache
def weights(adapter: float = 0.3) -> tuple:
    """(base, lora) of `MODEL`."""
    v = random_variables(MODEL, adapter=adapter)
    return v["params"], v["lora"]


def image(rng: np.random.Generator, height: int, width: int) -> EncodedImage:
    """A random picture; sizes in patches."""
    patches = rng.standard_normal((height * width, CONFIG.vision.patch_dim)).astype(np.float32)
    return EncodedImage(patches, (1, height, width))


def words(rng: np.random.Generator, n: int) -> tuple[int, ...]:
    return tuple(int(i) for i in rng.integers(0, WORDS, n))


def row(seed: int, *sizes: tuple[int, int], teachers: int = 3) -> Row:
    """A row with one picture per size (height and width in patches), and turns of different lengths."""
    rng = np.random.default_rng([seed, 1])
    prefix = (TURN, *words(rng, 3))
    for height, width in sizes:
        prefix += (VISION_START, *[IMAGE] * (height * width // 4), VISION_END)
    turns = [Turn(prefix, (*words(rng, n), TURN, *words(rng, 2))) for n in (7 + seed % 3, 0, 11, 9, 4, 5)]
    return Row(tuple(image(rng, *s) for s in sizes), turns[0], tuple(turns[1 : 1 + teachers]))


def valid(seed: int, n: int, description: tuple, reasoning: tuple, answer: tuple) -> Rollout:
    ids = words(np.random.default_rng([seed, 2]), n)
    return Rollout(ids, Spans(True, description, reasoning, answer, None))


def invalid(seed: int, n: int) -> Rollout:
    ids = words(np.random.default_rng([seed, 3]), n)
    return Rollout(ids, Spans(False, (0, 0), (0, 0), (0, 0), "no_box"))


BAD = (Row(), None)

# Eight (row, rollout) pairs each. Token counts are uneven on purpose.
MIXES = {
    "mixed": (
        (row(0, (4, 6)), valid(0, 16, (0, 5), (6, 12), (13, 15))),
        (row(1, (4, 4)), invalid(1, 9)),
        (row(2, (2, 2)), valid(2, 7, (0, 1), (2, 3), (5, 6))),  # parts of one token
        BAD,
        (row(4, (4, 4), (2, 6)), valid(4, 14, (0, 6), (7, 9), (11, 13))),  # two pictures
        (row(5, (6, 6)), invalid(5, 0)),  # nothing was said
        (row(6, (4, 2)), invalid(6, 1)),
        (row(7, (6, 4)), valid(7, 8, (0, 0), (2, 5), (6, 7))),  # a description inside a delimiter token
    ),
    "all valid": tuple(
        (row(10 + i, (4, 4)), valid(10 + i, 10 + i % 7, (0, 2 + i % 3), (5, 7), (8, 9 + i % 2))) for i in range(8)
    ),
    "all invalid": tuple((row(20 + i, (4, 4)), invalid(20 + i, 2 * i)) for i in range(8)),
    "all bad": (BAD,) * 8,
}


def pack(mix, *, roles=ROLES, buckets: Buckets = BUCKETS, config: ModelConfig = CONFIG):
    """The ScoreBatch of (row, rollout) pairs."""
    rows, rollouts = zip(*mix, strict=True)
    return pack_scores(rows, rollouts, roles=roles, config=config, buckets=buckets)


@functools.cache
def scorer(roles=ROLES, chunk: int = 5, model: VisionLanguageModel = MODEL, temperature: float = 1.0):
    """Compiled `score_batch`: (base, trained, batch, teacher_params={}) -> TokenScores."""
    objective = ObjectiveConfig(roles, chunk, temperature)
    return jax.jit(functools.partial(score_batch, model, objective=objective))


def objective_of(options: dict, roles=ROLES) -> ObjectiveConfig:
    """The objective that keyword arguments of a test ask for, taken out of them."""
    names = [f.name for f in dataclasses.fields(ObjectiveConfig) if f.name in options]
    return ObjectiveConfig(roles, **{"chunk": 5} | {name: options.pop(name) for name in names})


# An optimizer that changes nothing and keeps the last gradient as its state.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)


def micro_batches(batch, count: int) -> list:
    """Rows a, a + count, ... of a batch for each a."""
    return [jax.tree.map(lambda x, a=a: x[a::count], batch) for a in range(count)]


@functools.cache
def gradient_step(gradient_accumulation_steps: int = 1, roles=ROLES, model: VisionLanguageModel = MODEL, **options):
    """Compiled train step that moves nothing: (base, trained, batch, average={}) -> (gradient, metrics)."""
    objective = objective_of(options, roles)
    step = make_train_step(model, KEEP_GRADIENT, objective, **{"use_dropout": False} | options)

    @jax.jit
    def run(base, trained, batch, average=None, others=NO_OTHERS):
        state = TrainState(jnp.zeros((), jnp.int32), trained, KEEP_GRADIENT.init(trained), average or {})
        batches = micro_batches(batch, gradient_accumulation_steps)
        state, metrics = step(state, base, batches, jax.random.key(0), others=others)
        return state.opt_state, metrics

    return run
