"""The shapes in annotations: checked at every call in these tests, and by nothing when the program runs."""

import importlib
import inspect
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from shape_checks import CHECKED

from vigos_jax.method import losses
from vigos_jax.method.roles import TeacherRole
from vigos_jax.models import attention, layers, vlm
from vigos_jax.rollouts import sampling

ROOT = pathlib.Path(__file__).resolve().parent.parent
B, T, N, H = 2, 5, 3, 8


def states(*shape):
    return jnp.ones(shape, jnp.float32)


def teachers(role):
    roles = (TeacherRole("a", "", "", ("completion",), "always", "forward_kl", 1.0, 0.0),)
    return losses.teacher_logits({"": states(B, T, H)}, role, heads={"": states(11, H)}, roles=roles)


@pytest.mark.parametrize("module", CHECKED)
def test_the_checks_are_on(module):
    """Every function that a checked module defines is wrapped by the checker."""
    loaded = importlib.import_module(module)
    functions = [f for _, f in inspect.getmembers(loaded, inspect.isfunction) if f.__module__ == module]
    assert functions and all(hasattr(f, "__wrapped__") for f in functions)


@pytest.mark.parametrize(
    "call",
    [
        lambda: layers.rotate(states(B, N, T, H), states(B, T, H // 2)),  # heads and tokens
        lambda: layers.mrope_angles(jnp.zeros((B, T, 3), int), theta=1e4, sections=(1, 1, 2)),
        lambda: attention.attention(*[states(B, T, N, H)] * 3, jnp.ones((T, B, T), bool)),
        lambda: attention.attention(*[states(B, T, N, H)] * 3, jnp.ones((B, T, T))),  # a mask of numbers
        lambda: losses.logits_of(states(B, T, H), states(H, 11)),  # [D, V]
        lambda: teachers(jnp.zeros((T, B), int)),
        lambda: sampling.draw(jax.random.split(jax.random.key(0), B), states(11, B), sampling.Sampling(1)),
    ],
)
def test_a_transposed_axis_is_refused(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_an_angle_per_number_is_refused():
    """A part of a head may rotate, but by an angle for each pair."""
    with pytest.raises(TypeError):
        layers.rotate(states(B, T, N, H), states(B, T, H))


def test_the_same_calls_with_their_axes_in_order():
    assert layers.rotate(states(B, T, N, H), states(B, T, H // 2)).shape == (B, T, N, H)
    assert attention.attention(*[states(B, T, N, H)] * 3, jnp.ones((B, T, T), bool)).shape == (B, T, N, H)
    assert losses.logits_of(states(B, T, H), states(11, H)).shape == (B, T, 11)
    assert teachers(jnp.zeros((B, T), int)).shape == (B, T, 11)


@pytest.mark.parametrize(
    "right, wrong",
    [
        ('-> Float[Array, "B T N H"]:\n    """Rotates', '-> Float[Array, "B N T H"]:\n    """Rotates'),
        ('x: Float[Array, "B T N H"], angles', 'x: Float[Array, "B T N H 1"], angles'),
        ('x: Float[Array, "B T N H"], angles', 'x: Int[Array, "B T N H"], angles'),
    ],
)
def test_a_wrong_annotation_is_found(tmp_path, monkeypatch, right, wrong):
    source = pathlib.Path(layers.__file__).read_text()
    assert source.count(right) == 1
    (tmp_path / "misannotated.py").write_text(source.replace(right, wrong))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "misannotated", raising=False)
    with jaxtyping.install_import_hook("misannotated", "shape_checks.checked"):
        misannotated = importlib.import_module("misannotated")
    with pytest.raises(jaxtyping.TypeCheckError):
        misannotated.rotate(states(B, T, N, H), states(B, T, H // 2))


def test_the_program_runs_without_them():
    """No checker is imported, and functions are what their source says."""
    code = (
        "import sys\nfrom vigos_jax import main\nfrom vigos_jax.models import layers, vlm\n"
        "from vigos_jax.training import loop\n"
        "assert 'beartype' not in sys.modules and not hasattr(layers.rotate, '__wrapped__')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert hasattr(layers.rotate, "__wrapped__") and vlm.__name__ in CHECKED
