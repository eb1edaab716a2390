"""Our side of the race against TRL: images and questions in, a rollout, three teachers, an optimizer step."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from benchmarks import models
from benchmarks.distillation_task import LEARNING_RATE, MAX_GRAD_NORM, Task
from vigos_jax.method.losses import ObjectiveConfig
from vigos_jax.method.packing import pack_prompts, pack_scores
from vigos_jax.method.roles import TeacherRole
from vigos_jax.method.rows import Rollout, Row
from vigos_jax.method.spans import Spans
from vigos_jax.models.variables import student_variables
from vigos_jax.rollouts.sampler import Sampler, row_keys
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.training.step import TrainState, make_train_step

CHUNK = 32  # supervised tokens per row whose logits exist at a time
# Random weights diverge by more than any clip: without one, no token's gradient is zero.
ROLES = tuple(dataclasses.replace(role, clip=0.0) for role in models.ROLES)
# What TRL's trainer has for a teacher: the student's own prompt, every token, reverse KL.
SAME_PROMPT = (TeacherRole("same_prompt", "", "", ("completion",), "always", "reverse_kl", 1.0, 0.0),)


def spans(row: int, task: Task) -> Spans:
    """Where a completion's parts are said to be: random weights write no tags. Of eight rows one is invalid."""
    n = task.completion
    if row % 8 == 7:
        return Spans(False, (0, 0), (0, 0), (0, 0), "no_box")
    description = 3 * n // 8
    return Spans(True, (0, description), (description, n - n // 8), (n - n // 8, n), None)


class OurStep:
    """Holds the adapters that it trains."""

    def __init__(self, task: Task):
        self.task = task
        scale = task.scale
        self.buckets = models.exact_buckets(task.config)
        remat = "none" if scale.is_exact else "full"
        self._model, self._base = models.model(task.config, remat=remat, dtype=scale.dtype), task.variables["params"]
        eos_ids = task.processor.eos_ids
        self._sampler = Sampler(self._model, Sampling(max_tokens=task.completion, temperature=0.0), eos_ids=eos_ids)
        clip, adamw = optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adamw(LEARNING_RATE, weight_decay=0.0)
        tx = optax.chain(clip, adamw)
        self._step = make_train_step(self._model, tx, ObjectiveConfig(ROLES, CHUNK), use_dropout=False)
        trained = jax.tree.map(jnp.copy, {"lora": task.variables["lora"]})  # a step donates them
        self._state = TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained), {})

    def rows(self) -> list[Row]:
        """The rows with the turns of the student and of three teachers, from images and texts."""
        task, out = self.task, []
        for image, question, answer in zip(task.images, task.questions, task.answers, strict=True):
            encoded = task.processor.encode_image(image)
            student, *teachers = (
                task.processor.encode_turn(user_text=text, grids=[encoded.grid], assistant_prefill="")
                for text in (question, "", question + answer, question + answer)
            )
            out.append(Row((encoded,), student, tuple(teachers)))
        return out

    def rollout(self) -> tuple[list[Row], list[Rollout], jax.Array]:
        """Rows, greedy completions, and the visual tokens that they were sampled behind."""
        rows = self.rows()
        prompts = jax.tree.map(jnp.asarray, pack_prompts(rows, config=self.task.config, buckets=self.buckets))
        variables = student_variables(self._base, self._state.trained)
        images = self._sampler.encode(variables, prompts)
        done = self._sampler(variables, prompts, row_keys(0, 0, len(rows)), images)
        sampled = enumerate(zip(done.ids, done.logps, strict=True))
        rollouts = [Rollout(ids, spans(i, self.task), logps) for i, (ids, logps) in sampled]
        return rows, rollouts, images

    def update(self, rows: Sequence[Row], rollouts: Sequence[Rollout], images: jax.Array) -> float:
        """Scores by all teachers, gradient, optimizer step; the loss."""
        options = {"config": self.task.config, "buckets": self.buckets, "with_images": False}
        batch = jax.tree.map(jnp.asarray, pack_scores(rows, rollouts, roles=ROLES, **options))
        batch = batch.replace(image_embeds=images)
        self._state, metrics = self._step(self._state, self._base, [batch], jax.random.key(0))
        jax.block_until_ready(self._state)
        return float(metrics["loss"])

    def loss_of_one_teacher(self, completions: Sequence[Sequence[int]]) -> float:
        """The loss of TRL's definition for these completions and the weights as they are now.

        The mean of KL(student || teacher) over all tokens, both reading the student's prompt.
        """
        rows = [dataclasses.replace(row, teachers=(row.prompt,)) for row in self.rows()]
        rollouts = [Rollout(tuple(ids), spans(i, self.task)) for i, ids in enumerate(completions)]
        packed = pack_scores(rows, rollouts, roles=SAME_PROMPT, config=self.task.config, buckets=self.buckets)
        objective = ObjectiveConfig(SAME_PROMPT, CHUNK)
        loss = jax.jit(lambda base, trained, batch: models.loss(self._model, base, trained, batch, objective))
        return float(loss(self._base, self._state.trained, jax.tree.map(jnp.asarray, packed)))
