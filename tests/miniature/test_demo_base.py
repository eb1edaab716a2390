"""The shipped base is what its card says: small, able to see, inclined to its priors, and leaky when privileged."""

import json

import pytest

from configs import demo_base
from vigos_jax.miniature import card
from vigos_jax.session import DEMO_FOLDER

QUESTIONS = 250  # of each kind; a rate's standard error is at most 0.032
TOLERANCE = 0.10


@pytest.fixture(scope="module")
def stated() -> dict:
    return json.loads((DEMO_FOLDER / "measured.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured() -> dict:
    config = demo_base.get_config()
    config.card_items, config.card_seed = QUESTIONS, 11  # other questions than the card's
    return card.measure(DEMO_FOLDER, config)


def test_it_is_small():
    assert sum(f.stat().st_size for f in DEMO_FOLDER.iterdir()) <= 8 << 20


@pytest.mark.slow
def test_the_student_is_what_the_card_states(stated, measured):
    for rate in ("score", "prior", "valid", "accuracy_given_valid", "description_accuracy", "leak"):
        assert measured["student"][rate] == pytest.approx(stated["student"][rate], abs=TOLERANCE), rate


@pytest.mark.slow
def test_privileged_teachers_leak_as_the_card_states(stated, measured):
    for role, rates in stated["teachers_given_a_wrong_reference"].items():
        for name, rate in rates.items():
            assert measured["teachers_given_a_wrong_reference"][role][name] == pytest.approx(rate, abs=TOLERANCE), name
        # The point of this base: a wrong reference gets into what the teacher claims to see.
        assert rates["description_follows_reference"] > 0.25


def test_the_readme_states_the_measured_numbers(stated):
    text = (DEMO_FOLDER / "README.md").read_text(encoding="utf-8")
    for rate in ("score", "prior", "valid", "accuracy_given_valid", "description_accuracy", "leak"):
        assert f"{stated['student'][rate]:.3f}" in text, rate
