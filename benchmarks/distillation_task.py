"""What both sides of the race against TRL are given: a model folder, weights, images, questions, a length."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

import vigos_jax.demo
from benchmarks import models, torch_step
from vigos_jax.data.processor import Processor
from vigos_jax.models.config import ModelConfig, VisionConfig

BASE = pathlib.Path(vigos_jax.demo.__file__).parent / "base"
# Ids of the demo's tokenizer, whose files the folder has; the model's vocabulary is larger.
CONTROL = {
    "bos_token_id": 475, "eos_token_id": 477, "pad_token_id": 475, "vision_start_token_id": 478,
    "vision_end_token_id": 479, "image_token_id": 480, "video_token_id": 481,
}  # fmt: skip
LEARNING_RATE, MAX_GRAD_NORM = 5e-6, 0.1

SMALL_SIZE = ModelConfig(
    family="qwen2_5_vl", hidden_size=128, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64,
    intermediate_size=256, vocab_size=1024, rope_theta=1e6, mrope_section=(8, 12, 12), rms_eps=1e-6,
    tie_embeddings=True, image_token_id=CONTROL["image_token_id"], video_token_id=CONTROL["video_token_id"],
    vision=VisionConfig(
        depth=2, hidden_size=64, num_heads=1, intermediate_size=128, out_hidden_size=128,
        window_size=112, full_attention_blocks=(1,),
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the work is.

    Attributes:
      sizes: of a sample; only its grid is used.
      phrases: how often a question repeats its phrase.
      dtype: of the base and the products; float32 keeps what is needed for the backward pass, bfloat16 recomputes it.
    """

    config: ModelConfig
    sizes: models.Sizes
    phrases: int
    dtype: Any = jnp.float32

    @property
    def is_exact(self) -> bool:
        """Whether both sides must choose the same tokens."""
        return self.dtype == jnp.float32


SCALES = {
    "small": Scale(SMALL_SIZE, dataclasses.replace(models.THIRD, grid=(8, 10)), phrases=3),
    "100M": Scale(models.MID_SIZE, models.THIRD, phrases=9),
    "3B": Scale(models.QWEN_3B, models.TYPICAL, phrases=27, dtype=jnp.bfloat16),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """The same work for both sides.

    Attributes:
      config, processor: of the folder.
      settings: transformers' config of the same model.
      variables: `params` in the scale's dtype, float32 `lora`; the adapters are not zero.
      images, questions: one a row; no question occurs twice.
      answers: shown to two of our three teachers.
      completion: tokens of every completion.
    """

    config: ModelConfig
    processor: Processor
    settings: Any
    variables: dict
    images: tuple[Image.Image, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    completion: int
    scale: Scale


def make_task(folder: pathlib.Path, *, scale: Scale, rows: int, completion: int) -> Task:
    """Writes the model folder and draws the rest; see `Task`."""
    size, (h, w) = scale.config, scale.sizes.grid
    settings = torch_step.transformers_config(size, CONTROL)
    _write_folder(folder, settings, pixels=h * w * size.vision.patch_size**2)
    config = ModelConfig.load(folder)
    rng = np.random.default_rng(0)
    shape = (h * size.vision.patch_size, w * size.vision.patch_size, 3)
    drawn = models.weights if scale.is_exact else models.weights_on_device
    return Task(
        config=config,
        processor=Processor.load(folder),
        settings=settings,
        variables=_never_control(drawn(config)),
        images=tuple(Image.fromarray(rng.integers(0, 256, shape, np.uint8)) for _ in range(rows)),
        questions=tuple(f"Question {i}: " + "what is left of the red square? " * scale.phrases for i in range(rows)),
        answers=tuple(f"The answer is {i}, a blue circle." for i in range(rows)),
        completion=completion,
        scale=scale,
    )


def _write_folder(folder: pathlib.Path, settings: Any, *, pixels: int) -> None:
    """A folder's config, with the demo's tokenizer and images of so many pixels."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(BASE / name, folder / name)
    image = json.loads((BASE / "preprocessor_config.json").read_text())
    image |= {"min_pixels": pixels, "max_pixels": pixels}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    settings.save_pretrained(folder)


def _never_control(variables: dict) -> dict:
    """With small embeddings of control tokens: their logits are near zero, so no greedy token is one of them.

    A completion then has its full length, without another decoding on either side.
    """
    embedding = variables["params"]["embedding"]
    ids = np.array(sorted(set(CONTROL.values())) + [476])  # and <|im_start|>
    return variables | {"params": variables["params"] | {"embedding": embedding.at[ids].multiply(0.02)}}
