"""Tiny random models of transformers (torch), of both families: what ours are compared with. For tests only.

Weights are drawn large enough that every part matters: logits have a standard deviation of one or more, and a
dropped feature moves them by far more than `TOLERANCE`.
"""

import copy
import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Sequence

import numpy as np
import peft
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.utils import logging

from vigos_jax.data.processor import EncodedImage, Turn

torch.set_num_threads(1)  # the tensors are too small to share

TOLERANCE = 1e-4  # of a float32 logit or visual feature
VOCAB, VISION_START, VISION_END, IMAGE, VIDEO = 120, 115, 116, 117, 118
FIRST_TEXT, LAST_TEXT = 2, 110  # ids of text tokens
WIDE, TALL, SMALL = (1, 12, 20), (1, 10, 6), (1, 4, 4)  # patches; all but the last cross window borders


def tiny_config(*, tied: bool) -> Qwen2_5_VLConfig:
    """Windows of 8 x 8 patches, full attention in vision blocks 1 and 3.

    The tied model has 3 decoder layers and 4 vision blocks, the untied one 5 and 6: short and long stacks may be
    compiled in different ways.
    """
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 64,
            "num_hidden_layers": 3 if tied else 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "vocab_size": VOCAB,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e3, "mrope_section": [2, 3, 3]},
            "rms_norm_eps": 1e-3,  # unlike the tower's
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 4 if tied else 6,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )


def tiny_qwen3_config(*, tied: bool) -> Qwen3VLConfig:
    """A 6 x 6 table of positions, DeepStack behind 2 of 4 vision blocks or 3 of 6; heads wider than the model / heads.

    As of `tiny_config`, the tied model's stacks are short, the untied one's long.
    """
    return Qwen3VLConfig(
        text_config={
            "hidden_size": 64,
            "num_hidden_layers": 3 if tied else 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 96,
            "vocab_size": VOCAB,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e3,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "rms_norm_eps": 1e-3,  # unlike the tower's
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 4 if tied else 6,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "patch_size": 16,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 2] if tied else [1, 2, 4],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )


def tiny_qwen3_5_config(*, tied: bool, layers: int = 0, **text) -> Qwen3_5Config:
    """Groups of three linear layers and a full one: 2 of them if tied, else 3; 2 key heads for 4 value heads.

    A quarter of a head of 32 rotates. text: further fields of `text_config`.
    """
    return Qwen3_5Config(
        text_config={
            "hidden_size": 64,
            "num_hidden_layers": layers or (8 if tied else 12),
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 96,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 8,
            "vocab_size": VOCAB,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e3,
                "partial_rotary_factor": 0.25,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
            "rms_norm_eps": 1e-3,  # unlike the tower's
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 0,
        }
        | text,
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "patch_size": 16,
            "num_position_embeddings": 36,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )


def tiny_model(*, tied: bool, family: str = "qwen2_5_vl", seed: int = 0) -> torch.nn.Module:
    """A float32 model with random weights, in evaluation mode."""
    configs = {"qwen2_5_vl": tiny_config, "qwen3_vl": tiny_qwen3_config, "qwen3_5": tiny_qwen3_5_config}
    return tiny_model_of(configs[family](tied=tied), seed=seed)


CLASSES = {
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "qwen3_5": Qwen3_5ForConditionalGeneration,
}


def tiny_model_of(config: Qwen2_5_VLConfig | Qwen3VLConfig | Qwen3_5Config, *, seed: int = 0) -> torch.nn.Module:
    """`tiny_model` of another config."""
    model = CLASSES[config.model_type](config)
    model = model.eval().requires_grad_(False)
    has_offset = config.model_type == "qwen3_5"  # its norms multiply by one more than their weight
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim == 1 and name.endswith(("norm.weight", "ln_q.weight", "norm1.weight", "norm2.weight")):
            # Signed in the last norm, so that a tied head does not just repeat the token it reads.
            mean = 0 if name.endswith("language_model.norm.weight") else 1
            offset = int(has_offset and "language_model" in name and "linear_attn" not in name)
            p.copy_(mean + 0.3 * noise - offset)
        elif name.endswith(("A_log", "dt_bias")):
            p.copy_(0.7 * noise - (2 if name.endswith("dt_bias") else 0))  # states that last for some 10 tokens
        elif name.endswith(".bias"):
            p.copy_(0.3 * noise)
        elif "embed_tokens" in name or "pos_embed" in name:
            p.copy_(noise)
        elif "lm_head" in name:
            p.copy_(0.8 * noise)
        else:
            p.copy_(noise / p[0].numel() ** 0.5)
    return model


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """A prompt with its images, expanded as the processor does it."""

    ids: tuple[int, ...]
    images: tuple[EncodedImage, ...] = ()

    @property
    def turn(self) -> Turn:
        return Turn(prefix_ids=self.ids[:1], rest_ids=self.ids[1:])

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(image.grid for image in self.images)

    def torch_inputs(self) -> dict[str, torch.Tensor]:
        """The arguments of a forward pass of this prompt alone."""
        return torch_batch([self])


def text_ids(n: int, rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(i) for i in rng.integers(FIRST_TEXT, LAST_TEXT, n))


@dataclasses.dataclass(frozen=True)
class Video:
    """Frames of a video: patches in time, height and width, and the seconds from one of them to the next."""

    grid: tuple[int, int, int]
    seconds: float = 1.0


def make_sample(parts: Sequence[int | tuple[int, int, int] | Video], seed: int, family: str = "qwen2_5_vl") -> Sample:
    """A sample of runs of text (a number of tokens), images (a grid) and videos, in the order given."""
    rng = np.random.default_rng(seed)
    size = 14 if family == "qwen2_5_vl" else 16
    ids, images = (), []
    for part in parts:
        if isinstance(part, int):
            ids += text_ids(part, rng)
            continue
        grid = part.grid if isinstance(part, Video) else part
        patches = rng.normal(size=(int(np.prod(grid)), 3 * 2 * size**2)).astype(np.float32)
        if not isinstance(part, Video):
            images.append(EncodedImage(patches, grid))
            ids += (VISION_START, *[IMAGE] * (len(patches) // 4), VISION_END)
        elif family == "qwen2_5_vl":
            # The reference's default: 4 positions per second.
            images.append(EncodedImage(patches, grid, "", 4 * part.seconds))
            ids += (VISION_START, *[VIDEO] * (len(patches) // 4), VISION_END)
        else:
            for frame in np.split(patches, grid[0]):
                images.append(EncodedImage(frame, (1, *grid[1:]), "a time stamp"))
                ids += (*text_ids(3, rng), VISION_START, *[VIDEO] * (len(frame) // 4), VISION_END)
    return Sample(ids, tuple(images))


def torch_batch(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """The arguments of a forward pass or of `generate`, left-padded. Each frame of Qwen3-VL is a video of its own."""
    length = max(len(s.ids) for s in samples)
    ids = torch.tensor([[0] * (length - len(s.ids)) + list(s.ids) for s in samples])
    mask = torch.tensor([[0] * (length - len(s.ids)) + [1] * len(s.ids) for s in samples])
    inputs = {"input_ids": ids, "attention_mask": mask}
    images = [image for s in samples for image in s.images if image.label is None]
    videos = [image for s in samples for image in s.images if image.label is not None]
    for visuals, pixels, grids in (
        (images, "pixel_values", "image_grid_thw"),
        (videos, "pixel_values_videos", "video_grid_thw"),
    ):
        if visuals:
            inputs |= {
                pixels: torch.tensor(np.concatenate([v.patches for v in visuals])),
                grids: torch.tensor([v.grid for v in visuals]),
                "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
            }
    if any(v.label == "" for v in videos):
        inputs["second_per_grid_ts"] = torch.tensor([v.time_step / 4 for v in videos])
    return inputs


@torch.no_grad()
def torch_logits(model: torch.nn.Module, samples: Sequence[Sample]) -> np.ndarray:
    """Float32 [B, T, V] of a left-padded batch."""
    return model(**torch_batch(samples)).logits.float().numpy()


@torch.no_grad()
def torch_images(model: torch.nn.Module, sample: Sample) -> np.ndarray:
    """Visual tokens of one sample's pictures and frames, [M, (1 + n) D], DeepStack's features beside the last ones."""
    pixels = torch.tensor(np.concatenate([image.patches for image in sample.images]))
    out = model.model.get_image_features(pixels, torch.tensor(sample.grids))
    features = [out.pooler_output, *getattr(out, "deepstack_features", ())]
    return torch.cat([torch.cat(list(f)) for f in features], -1).float().numpy()


@torch.no_grad()
def with_adapter(model: torch.nn.Module, *, seed: int = 0, **config) -> peft.PeftModel:
    """A copy of the model with a LoRA adapter of peft whose A and B are both random. `config`: of `LoraConfig`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's use of transformers, not ours
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, p in adapted.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
    return adapted


@functools.cache
def cached_model(*, tied: bool, family: str = "qwen2_5_vl") -> torch.nn.Module:
    """A model that tests share and must not change."""
    return tiny_model(tied=tied, family=family)


def save(model: torch.nn.Module, folder: pathlib.Path, **kwargs) -> pathlib.Path:
    """`save_pretrained` without its progress bar. Returns the folder."""
    logging.disable_progress_bar()
    model.save_pretrained(folder, **kwargs)
    return folder


def max_difference(a, b) -> float:
    """Largest absolute difference of two arrays of one shape; infinite if any of it is not finite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape and a.size, (a.shape, b.shape)
    difference = np.max(np.abs(a - b))
    return float(difference) if np.isfinite(difference) else float("inf")
