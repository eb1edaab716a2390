"""The shipped bases are what their cards say: small, able to see, inclined to their priors, leaky when privileged."""

import json

import pytest

from configs import demo_base, demo_reasoning_base
from vigos_jax.demo.world import WORLDS
from vigos_jax.miniature import card

QUESTIONS = 250  # of each kind; a rate's standard error is at most 0.032
TOLERANCE = 0.10
CONFIGS = {"demo": demo_base, "demo_reasoning": demo_reasoning_base}


@pytest.fixture(scope="module", params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def stated(name) -> dict:
    return json.loads((WORLDS[name].base / "measured.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured(name) -> dict:
    config = CONFIGS[name].get_config()
    config.card_items, config.card_seed = QUESTIONS, 11  # other questions than the card's
    return card.measure(WORLDS[name].base, config)


def test_it_is_small(name):
    assert set(CONFIGS) == set(WORLDS)
    assert sum(f.stat().st_size for f in WORLDS[name].base.iterdir()) <= 8 << 20


@pytest.mark.slow
def test_the_student_is_what_the_card_states(stated, measured):
    for rate in ("score", "prior", "valid", "accuracy_given_valid", "description_accuracy", "leak"):
        assert measured["student"][rate] == pytest.approx(stated["student"][rate], abs=TOLERANCE), rate


@pytest.mark.slow
def test_privileged_teachers_leak_as_the_card_states(name, stated, measured):
    for role, rates in stated["teachers_given_a_wrong_reference"].items():
        for kind, rate in rates.items():
            assert measured["teachers_given_a_wrong_reference"][role][kind] == pytest.approx(rate, abs=TOLERANCE), kind
        # The point of these bases: a wrong reference gets into what the teacher claims to see. In the second world a
        # description must have two things right for that.
        assert rates["description_follows_reference"] > (0.25 if name == "demo" else 0.2)


def test_the_readme_states_the_measured_numbers(name, stated):
    text = (WORLDS[name].base / "README.md").read_text(encoding="utf-8")
    for rate in ("score", "prior", "valid", "accuracy_given_valid", "description_accuracy", "leak"):
        assert f"{stated['student'][rate]:.3f}" in text, rate
    assert CONFIGS[name].get_config().file in text
