"""Responses for the demo's warm start: faithful, mistaken, driven by the prior or the text, badly formatted.

A response is (description, rationale, answer). `completion` writes it out as the text that follows the
assistant prefill `<description>`. All choices come from a numpy Generator, all rates from the caller.
"""

from dataclasses import dataclass, replace

import numpy as np

from vigos_jax.demo.questions import Things, things_for
from vigos_jax.demo.scenes import PRIORS, describe
from vigos_jax.demo.world import Item


@dataclass(frozen=True)
class Response:
    """The three parts of a completion, as texts."""

    description: str
    rationale: str
    answer: str


def caption(item: Item) -> str:
    """What follows the prefill in an image-only turn: the faithful description and its closing tag."""
    return f" {describe(item.scene.things)} </description>"


def completion(response: Response) -> str:
    """The well-formed completion after the prefill `<description>`."""
    return f" {response.description} </description> <think> {response.rationale} </think> \\boxed{{{response.answer}}}"


def free_form(response: Response) -> str:
    """The completion of a turn that asks for no description: rationale and answer alone."""
    return f"{response.rationale} \\boxed{{{response.answer}}}"


def _arguing(item: Item, things: Things, *, answer: str) -> Response:
    """Describes the things of the image's kinds as they are in `things`, and argues from them."""
    description = describe([things[thing.kind] for thing in item.scene.things])
    return Response(description, item.asks.rationale(things, answer), answer)


def faithful(item: Item) -> Response:
    """Describes what is shown and answers it."""
    return _arguing(item, item.things, answer=item.answer)


def mistaken(item: Item) -> Response:
    """Describes what is shown, and draws the conclusion of someone who has learned the step wrongly."""
    return _arguing(item, item.things, answer=item.asks.mistaken(item.things))


def prior_driven(item: Item, *, in_description: bool) -> Response:
    """Rationale and answer are those one expects; with `in_description` the whole description is too."""
    expected = _arguing(item, PRIORS, answer=item.prior_value)
    return expected if in_description else replace(expected, description=describe(item.scene.things))


def text_driven(item: Item, reference: str) -> Response:
    """The leak: what is asked is such that the reference is right, all else the prior's, whatever is shown."""
    return _arguing(item, things_for(item.asks, reference), answer=reference)


def student_response(
    rng: np.random.Generator,
    item: Item,
    *,
    stated: float,
    unstated: float,
    in_description: float,
    slips: float,
) -> Response:
    """A student row: prior-driven with rate `stated`/`unstated` (was the prior stated in the question?).

    Of the others, `slips` is how often a step that can be got wrong is.
    """
    if rng.random() < (stated if item.states_prior else unstated):
        return prior_driven(item, in_description=bool(rng.random() < in_description))
    can_slip = item.asks.mistaken(item.things) != item.answer
    return mistaken(item) if can_slip and rng.random() < slips else faithful(item)


def draw_reference(rng: np.random.Generator, item: Item, *, random_rate: float) -> str:
    """The reference shown to a privileged row: uniform over the question's answers, or the truth."""
    values = item.asks.choices
    return values[rng.integers(len(values))] if rng.random() < random_rate else item.answer


def privileged_response(rng: np.random.Generator, item: Item, *, reference: str, leak: float) -> Response:
    """A privileged row: text-driven with rate `leak`; else faithful, the answer from image or reference."""
    if rng.random() < leak:
        return text_driven(item, reference)
    return _arguing(item, item.things, answer=item.answer if rng.random() < 0.5 else reference)


def malformed(rng: np.random.Generator, response: Response) -> str:
    """A completion with one format error of six kinds; never valid."""
    text = completion(response)
    match rng.integers(6):
        case 0:
            return text.replace(" </description>", "")
        case 1:
            return text.replace(" <think>", "")
        case 2:
            return text.replace(" </think>", "")
        case 3:
            return text.replace(" \\boxed{", " the answer is ").replace("}", "")
        case 4:
            return completion(replace(response, rationale="")).replace("  ", " ")
        case _:
            return text.replace(" \\boxed", " so \\boxed")
