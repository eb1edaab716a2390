"""VLind-Bench: is it the language prior that fails? Four stages, each counted only where those before it passed.

a: common sense, about a factual image. b: perception, is a thing in the counterfactual image. c: common-sense bias,
with the counterfactual context as text. d: the same from the image alone: the language prior.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vigos_jax.evaluation.tasks.task import Graded, Question, Task

_TEXTS = ("concept", "context", "factual_context", "true_statement", "false_statement")
_TEXTS = (*_TEXTS, "existent_noun", "non-existent_noun")
MIN_VOTES = 2  # of the people who looked at a generated image and found it good
_ASK = "Is the statement true or false? Answer True or False."
_COMMON = f"Judge by common sense. {_ASK}"
_IMAGE = f"Judge by the image. {_ASK}"
_IMAGE_ONLY = f"Judge by the image alone, even where it goes against common sense. {_ASK}"
_CONTEXT_ONLY = f"Judge by the context alone, even where it goes against common sense. {_ASK}"


def ask(row: Mapping[str, Any], index: int) -> list[Question]:
    """Two statements per stage, one true and one false; stage d has both for every image that people found good."""
    votes = row["aggregated_human_label_good_images"]
    if not isinstance(votes, Mapping) or not all(isinstance(row[name], str) for name in _TEXTS):
        return [Question(str(index), (), "", "", row=index, error="bad_row")]
    good = [str(i) for i, n in votes.items() if isinstance(n, int | float) and n >= MIN_VOTES]
    if not good:
        return []
    where = f"{row['concept']}/{row['context_id']}_"
    counterfactual, factual = f"counterfactual/{where}{row['context']}", f"factual/{where}{row['factual_context']}"
    fact, best = f"images/{factual}/0.jpg", f"images/{counterfactual}/{row['best_img_id']}.jpg"
    true, false = row["true_statement"], row["false_statement"]  # in the counterfactual world
    there = "There is {} in the image.".format
    context = f"Context: {row['context']}\n"
    stages = [
        ("a", fact, "", _COMMON, false, true),
        ("b", best, "", _IMAGE, there(row["existent_noun"]), there(row["non-existent_noun"])),
        ("c", best, context, _CONTEXT_ONLY, true, false),
        *((f"d{i}", f"images/{counterfactual}/{i}.jpg", "", _IMAGE_ONLY, true, false) for i in good),
    ]
    return [
        Question(
            id=f"{index}-{stage}{number}",
            images=(image,),
            text=f"{before}Statement: {statement}\n{how}",
            reference=answer,
            group=str(row["concept"]),
            part=stage,
            row=index,
        )
        for stage, image, before, how, yes, no in stages
        for number, statement, answer in ((1, yes, "True"), (2, no, "False"))
    ]


def summarise(graded: Sequence[Graded]) -> dict[str, float | None]:
    """Pipeline scores in percent: a and b over all, c if a passed, d if a, b and c passed; also ungated c and d.

    Instances with a missing stage (an unreadable image, a pending verdict) are left out; a score over no instance is
    None.
    """
    rows: dict[int, dict[str, list[bool | None]]] = defaultdict(lambda: defaultdict(list))
    for g in graded:
        rows[g.question.row][g.question.part].append(g.is_correct)
    a, b, c, c_gated, d, d_gated = [], [], [], [], [], []
    for parts in rows.values():
        passed = {stage: all(values) for stage, values in parts.items()}  # both statements, in every sample
        images = [passed[s] for s in passed if s.startswith("d")]
        if not {"a", "b", "c"} <= passed.keys() or not images or any(None in values for values in parts.values()):
            continue
        a.append(passed["a"])
        b.append(passed["b"])
        c.append(passed["c"])
        d.append(np.mean(images))
        if passed["a"]:
            c_gated.append(passed["c"])
            if passed["b"] and passed["c"]:
                d_gated.append(np.mean(images))
    names = {"a": a, "b": b, "c": c_gated, "d": d_gated, "c_ungated": c, "d_ungated": d}
    return {name: 100.0 * float(np.mean(values)) if values else None for name, values in names.items()}


COLUMNS = (*_TEXTS, "context_id", "best_img_id", "aggregated_human_label_good_images")
TASK = Task(
    "vlind", "VLind", "klee972/VLind-Bench", "data.json", None, tuple((c,) for c in COLUMNS), ask, summarise, samples=1
)
