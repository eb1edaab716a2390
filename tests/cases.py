"""Cases of a parametrised test, of which the first show in `make test` what the others show too."""

from collections.abc import Iterable

import pytest


def others_slow(cases: Iterable, *, quick: int = 1) -> list:
    """`cases`, those after the first `quick` marked slow."""

    def slow(case):
        return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)

    return [case if i < quick else slow(case) for i, case in enumerate(cases)]
