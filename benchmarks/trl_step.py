"""TRL's side of the race: its DistillationTrainer as it is, with clocks around a step and around its rollout.

Importing this module needs `trl`. The trainer is given transformers' PIL image processor, as ours is: it needs no
torchvision.
"""

import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PrinterCallback, ProcessorMixin, Qwen2_5_VLProcessor, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from benchmarks import torch_step
from benchmarks.distillation_task import LEARNING_RATE, MAX_GRAD_NORM, Task
from vigos_jax.data.tokenizer_files import open_image_processor, open_tokenizer


class ImagesAndText(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without that of videos, the part which torchvision is for."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class TimedTrainer(DistillationTrainer):
    """Keeps the seconds, the batch and the loss of the last step's rollout."""

    rollout_seconds: float
    _last: tuple[dict[str, torch.Tensor], torch.Tensor]

    def _prepare_inputs(self, generation_batch):
        start = time.perf_counter()
        inputs = super()._prepare_inputs(generation_batch)
        _wait()
        self.rollout_seconds = time.perf_counter() - start
        return inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._last = inputs, (out[0] if return_outputs else out).detach()
        return out

    def last_loss(self) -> float:
        return float(self._last[1])

    def last_completions(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Prompt -> completion, token ids without padding."""
        inputs, _ = self._last
        ids = (_unpadded(inputs[f"{part}_ids"], inputs[f"{part}_mask"]) for part in ("prompt", "completion"))
        return dict(zip(*ids, strict=True))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _unpadded(ids: torch.Tensor, mask: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row[keep.bool()].tolist()) for row, keep in zip(ids, mask, strict=True)]


class Turns(TrainerCallback):
    """Times a step, then hands over to the other side.

    Attributes:
      after_step: called with the step's seconds.
    """

    def __init__(self, after_step: Callable[[float], None]):
        self.after_step, self._start = after_step, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        _wait()
        self.after_step(time.perf_counter() - self._start)


def make_trainer(
    task: Task, folder: str, *, steps: int, after_step: Callable[[TimedTrainer, float], None]
) -> TimedTrainer:
    """A trainer whose `train()` takes so many steps, and calls `after_step(trainer, seconds)` behind each.

    Args:
      folder: for what the trainer writes.
    """
    torch.set_num_threads(os.cpu_count() or 1)  # as many as XLA takes
    student = torch_step.with_adapters(_base(task), task.config, task.variables)
    folder_of_model = pathlib.Path(task.processor.folder)
    tokenizer = open_tokenizer(folder_of_model)
    tokenizer.padding_side = "left"
    image_processor = open_image_processor(folder_of_model, task.config)
    prompts = [[{"role": "user", "content": question}] for question in task.questions]
    rows = datasets.Dataset.from_dict({"prompt": prompts, "image": list(task.images)})
    trainer: Any = TimedTrainer(
        model=student,
        teacher_model=_base(task).eval(),
        args=_arguments(task, folder, steps),
        train_dataset=rows,
        processing_class=ImagesAndText(image_processor, tokenizer, tokenizer.chat_template),
        callbacks=[Turns(lambda seconds: after_step(trainer, seconds))],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _base(task: Task):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch_step.torch_base(
        task.config, task.variables, task.settings, dtype=np.dtype(task.scale.dtype), device=device
    )


def _arguments(task: Task, folder: str, steps: int) -> DistillationConfig:
    """No dropout, greedy tokens, the scale's dtype and recomputation: as our side has it."""
    return DistillationConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=len(task.images),
        gradient_accumulation_steps=1,
        gradient_checkpointing=not task.scale.is_exact,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        max_completion_length=task.completion,
        generation_kwargs={"do_sample": False},
        beta=1.0,  # reverse KL
        bf16=not task.scale.is_exact,
        use_cpu=not torch.cuda.is_available(),
        pad_to_multiple_of=None,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
