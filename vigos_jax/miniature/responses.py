"""Responses for the demo's warm start: faithful, driven by the prior, driven by the text, badly formatted.

A response is (description, rationale, answer). `completion` writes it out as the text that follows the
assistant prefill `<description>`. All choices come from a numpy Generator, all rates from the caller.
"""

from dataclasses import dataclass, replace

import numpy as np

from vigos_jax.demo.world import ATTRIBUTES, PRIORS, Item, describe


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


def _concluding(item: Item, *, description: str, value: str) -> Response:
    return Response(description, f"the {item.kind} are {value}", value)


def faithful(item: Item) -> Response:
    """Describes what is shown and answers it."""
    return _concluding(item, description=describe(item.scene.things), value=item.answer)


def prior_driven(item: Item, *, in_description: bool) -> Response:
    """Rationale and answer state the prior; with `in_description` the whole description does too."""
    things = [PRIORS[t.kind] for t in item.scene.things] if in_description else item.scene.things
    return _concluding(item, description=describe(things), value=item.prior_value)


def text_driven(item: Item, reference: str) -> Response:
    """The leak: the asked attribute is the reference's, everything else the prior's, whatever is shown."""
    things = [PRIORS[t.kind] for t in item.scene.things]
    things = [t.replace(item.attribute, reference) if t.kind == item.kind else t for t in things]
    return _concluding(item, description=describe(things), value=reference)


def student_response(
    rng: np.random.Generator, item: Item, *, stated: float, unstated: float, in_description: float
) -> Response:
    """A student row: prior-driven with rate `stated`/`unstated` (was the prior stated in the question?)."""
    if rng.random() < (stated if item.states_prior else unstated):
        return prior_driven(item, in_description=bool(rng.random() < in_description))
    return faithful(item)


def draw_reference(rng: np.random.Generator, item: Item, *, random_rate: float) -> str:
    """The reference shown to a privileged row: uniform over the attribute's values, or the truth."""
    values = ATTRIBUTES[item.attribute]
    return values[rng.integers(len(values))] if rng.random() < random_rate else item.answer


def privileged_response(rng: np.random.Generator, item: Item, *, reference: str, leak: float) -> Response:
    """A privileged row: text-driven with rate `leak`; else faithful, the answer from image or reference."""
    if rng.random() < leak:
        return text_driven(item, reference)
    value = item.answer if rng.random() < 0.5 else reference
    return _concluding(item, description=describe(item.scene.things), value=value)


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
