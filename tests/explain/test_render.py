"""`--help FIELD`, and the page of the documentation that says the same."""

import pytest

from vigos_jax import main
from vigos_jax.errors import InputError
from vigos_jax.explain.fields import all_fields
from vigos_jax.explain.render import explain, markdown


def test_one_field():
    for name in ("optimizer.max_grad_norm", "config.optimizer.max_grad_norm"):
        lines = explain(name).splitlines()
        assert lines[0] == "config.optimizer.max_grad_norm"
        assert lines[1] == "    A gradient of a larger global norm is scaled down to it."
        assert lines[3] == "    default  1.0" and lines[4] == "    is       a finite number, above 0"
        assert lines[5].startswith("    change   0.1 is the paper's.")


def test_a_section_lists_its_fields():
    said = explain("loss")
    assert said.startswith("config.loss\n") and "    loss.chunk = 32\n        Supervised tokens" in said
    assert "sampling" not in said
    assert "roles.NAME.weight" in explain("roles") and "roles.NAME.weight" in explain("roles.perception")
    assert "judge.mode" in explain("eval.judge") and "eval.tasks" not in explain("eval.judge")


def test_a_role_of_any_name():
    assert "default  2.0" in explain("roles.reference.weight")  # the shipped one's
    assert "default  required" in explain("roles.examiner.weight")
    assert "forward_kl, reverse_kl, jsd" in explain("roles.examiner.divergence")
    assert "default  '<description>'" in explain("prompts.student.assistant_prefill")
    assert "enable_thinking" in explain("model.chat_template_kwargs.enable_thinking")


@pytest.mark.parametrize(
    "name, choices",
    [
        ("max_tokens", ["sampling.max_tokens", "eval.max_tokens"]),
        ("sampling.max_token", ["sampling.max_tokens"]),
        ("roles.reference.weigth", ["roles.NAME.weight"]),
        ("prompts.student.user.x", []),
        ("qqqq", ["steps", "sampling"]),
        ("steps.x", []),
    ],
)
def test_no_such_field(name, choices):
    with pytest.raises(InputError, match=rf"^--help {name}: there is no such field; choices: ") as e:
        explain(name)
    assert all(choice in str(e.value) for choice in choices), e.value


def test_the_command_line(capsys):
    assert main.main(["vigos_jax", "--config=x.py", "--help", "seed", "loss.chunk", "-v"]) == 0
    said = capsys.readouterr().out
    assert said == explain("seed") + "\n" + explain("loss.chunk")
    assert main.main(["vigos_jax", "--help", "sead"]) == 2
    assert capsys.readouterr().err == "vigos_jax: --help sead: there is no such field; choices: seed\n"


def test_the_page_has_every_field_once():
    lines = markdown().splitlines()
    listed = "\n".join(lines)
    for field in all_fields():
        made_with_section = field.name.startswith(("eval.sources.", "data.columns."))
        is_heading = [line for line in lines if line.startswith("#") and line.endswith(f" `{field.name}`")]
        assert len(is_heading) == (0 if made_with_section else 1), field.name
        assert f"`{field.name}`" in listed
