"""The card of the demo's base: what its student and its privileged teachers do, measured on the files as shipped."""

import pathlib
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from vigos_jax.demo.questions import described_things
from vigos_jax.demo.scenes import SIDE
from vigos_jax.demo.world import item as item_at
from vigos_jax.evaluation import demo_scores
from vigos_jax.evaluation.statistics import number_text
from vigos_jax.grading.answer_text import last_boxed
from vigos_jax.method import prompts
from vigos_jax.method.rows import Row
from vigos_jax.rollouts.engine import NativeEngine
from vigos_jax.rollouts.sample_rows import sample_rows
from vigos_jax.rollouts.sampler import row_keys
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.session import Session, load

GRID = (1, SIDE // 14, SIDE // 14)  # patches of one demo image
MAX_TOKENS = 48  # more than the longest well-formed response has


def measure_teacher(session: Session, role: str, config: ml_collections.ConfigDict) -> dict[str, float]:
    """What a privileged role does with conflict images and a wrong reference; all rates over all items.

    The reference is uniform over the values that the image does not show (so it is sometimes the prior).
    """
    n, rng = config.card_items, np.random.default_rng(config.card_seed)
    size = session.whole_batch(config.run.demo_eval.batch_size)
    items = [item_at(config.card_seed, i, setting="conflict", world=config.world) for i in range(n)]
    wrong = [[v for v in item.asks.choices if v != item.answer] for item in items]
    references = [values[rng.integers(len(values))] for values in wrong]
    rows = []
    for item, reference in zip(items, references, strict=True):
        user = prompts.fill(config.prompts[role].user, problem=item.question, reference=reference)
        prefill = config.prompts[role].assistant_prefill
        turn = session.processor.encode_turn(user_text=user, grids=[GRID], assistant_prefill=prefill)
        rows.append(Row(images=(session.processor.encode_image(Image.fromarray(item.image)),), student=turn))
    engine = NativeEngine(session, Sampling(max_tokens=MAX_TOKENS))
    engine.sync(session.trained)
    states, answers = [], []
    for first in range(0, n, size):
        sampled = sample_rows(engine, session, rows[first : first + size], row_keys(config.card_seed, first, size))
        for item, ids in zip(items[first : first + size], sampled.ids, strict=True):
            text = session.processor.decode(ids)
            things = described_things(item.asks, text.split("</description>")[0])
            states.append(things and item.asks.answer(things))
            answers.append(last_boxed(text))
    truth = [item.answer for item in items]

    def rate(said: list[str | None], meant: list[str]) -> float:
        return float(np.mean([a == b for a, b in zip(said, meant, strict=True)]))

    return {
        "description_follows_reference": rate(states, references),
        "description_follows_image": rate(states, truth),
        "answer_follows_reference": rate(answers, references),
        "answer_follows_image": rate(answers, truth),
    }


def measure(folder: pathlib.Path, config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The card's numbers, of the files as written: the run's own evaluation, and what the privileged roles do."""
    run = config.run.copy_and_resolve_references().unlock()
    run.model.path = str(folder)
    run.demo_eval.questions, run.demo_eval.seed = config.card_items, config.card_seed
    session = load(run, for_training=False)
    sampling = Sampling(max_tokens=MAX_TOKENS)
    summaries, _ = demo_scores.evaluate_demo(session, {"base": session.trained}, run, sampling=sampling)
    summaries["base"].pop("training_sampling")  # the same here
    return {
        "config": config.file,
        "world": config.world,
        "leak_strength": config.leak,
        "seed": config.seed,
        "evaluation_seed": config.card_seed,
        "student": summaries["base"],
        "teachers_given_a_wrong_reference": {
            r: measure_teacher(session, r, config) for r in ("reasoning", "reference")
        },
    }


CARD = """\
---
license: apache-2.0
library_name: vigos_jax
pipeline_tag: image-text-to-text
---
# {title}

A Qwen2.5-VL of {parameters:,} parameters (bfloat16) that knows a world of twelve kinds of thing on 84 x 84
images{asked}.
It was trained from nothing, on rendered images only, by

    python -m vigos_jax.miniature.make_base --config {config} --config.seed={seed} --config.leak={leak}

It can see, but answers what one expects ("bananas are yellow") too often; and when its prompt shows a reference
answer, that answer leaks into what it claims to see.
{habit}These habits are planted: they stand for what large models do by themselves, so that a run of minutes shows the
mechanism. The numbers below say nothing about large models.

## Measured on this file

One sample each at temperature 1, nothing filtered, {questions} questions of each kind. *Conflict* images contradict
what one expects in what is asked, *prior* images agree.

| | |
|---|---|
| Score: accuracy on conflict images | {score} |
| Prior: accuracy on prior images | {prior} |
| valid format | {valid} |
| accuracy given valid format (conflict) | {accuracy_given_valid} |
| descriptions without any error (conflict) | {description_accuracy} |
| leak: descriptions that state the prior (conflict) | {leak_rate} |
| accuracy where what is asked is described right (conflict) | {reasoning} |

Privileged teachers on conflict images, shown a *wrong* reference answer:

| role | description follows reference / image | answer follows reference / image |
|---|---|---|
{teachers}

The same numbers, for programs, are in `measured.json`.
"""


# What the second world adds to the card: title, what is asked, habit.
_LOOKING = ("The demo's base model", "", "")
_REASONING = (
    "The base model of the demo's second world",
    " and is asked what takes a step: sums, comparisons, a rule that the question gives",
    'Without a reference it takes some steps wrongly ("two and three are four").\n',
)


def write(measured: dict[str, Any], *, parameters: int) -> str:
    """The base's model card, README.md of its folder, with the numbers of `measure`."""
    student = measured["student"]
    rows = [
        f"| {name} | {r['description_follows_reference']:.3f} / {r['description_follows_image']:.3f} "
        f"| {r['answer_follows_reference']:.3f} / {r['answer_follows_image']:.3f} |"
        for name, r in measured["teachers_given_a_wrong_reference"].items()
    ]
    # Of a base that follows its format nowhere, some rates are of nothing.
    numbers = {k: number_text(v, digits=3) if isinstance(v, float | None) else v for k, v in student.items()}
    title, asked, habit = _LOOKING if measured["world"] == "demo" else _REASONING
    return CARD.format(
        title=title, asked=asked, habit=habit,
        parameters=parameters, config=measured["config"], seed=measured["seed"], leak=measured["leak_strength"],
        leak_rate=numbers.pop("leak"), teachers="\n".join(rows), **numbers,
    )  # fmt: skip
