"""The README.md of an export: what it came from, how it was made, what was measured and what was not."""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from vigos_jax import __version__
from vigos_jax.demo.world import WORLDS
from vigos_jax.method.prompts import fields
from vigos_jax.models.families import FAMILIES
from vigos_jax.models.layers import LoraSpec
from vigos_jax.runtime import workdir as files
from vigos_jax.runtime.hub import REPOSITORY
from vigos_jax.runtime.jsonl import read_steps
from vigos_jax.runtime.paths import absolute

_LICENSE = ("license", "license_name", "license_link")
_PAPER = "[arXiv 2606.19120](https://arxiv.org/abs/2606.19120)"
_LOAD_MERGED = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype="auto")
processor = AutoProcessor.from_pretrained(FOLDER)"""
_LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained(BASE, dtype="auto")
model = PeftModel.from_pretrained(base, FOLDER)"""


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """The training that an export comes from.

    Attributes:
      step: optimizer steps taken.
      metrics: the last row of metrics.jsonl up to that step; {} if there is none.
    """

    step: int
    metrics: Mapping[str, Any]

    @classmethod
    def of(cls, workdir: pathlib.Path, step: int) -> "RunFacts":
        """The run in `workdir` after `step` steps, with the metrics of the last of them that were written."""
        rows, _ = read_steps(workdir / files.METRICS)
        metrics = [row.value for row in rows if row.value["step"] <= step]
        return cls(step, metrics[-1] if metrics else {})


def card_text(
    config,
    *,
    base: pathlib.Path,
    family: str,
    lora: LoraSpec | None,
    run: RunFacts | None,
    report: Mapping[str, Any] | None,
) -> str:
    """The card of an export as `config.export` describes it.

    Args:
      base: the base model's folder, whose own card gives the license.
      family: the base's, whose license it is where the folder has no card that gives one.
      lora: the student's adapter, if it has one.
      run: None if nothing was trained here.
      report: of `verify.compare`; None if nothing was compared.
    """
    name, is_adapter = _base_name(config.model.path), config.export.kind == "adapter"
    parts = [f"---\n{_metadata(config, base, family, is_adapter=is_adapter)}---"]
    parts.append(f"# {name.rsplit('/', 1)[-1]}, {'post-trained' if run else 'exported'}")
    kind = "A LoRA adapter for" if is_adapter else f"A full checkpoint ({config.export.dtype}) of"
    if run:
        method = "ViGOS, visually grounded on-policy self-distillation"
        if not _teaches_itself(config):
            method = "on-policy distillation from other models, by the roles of ViGOS"
        parts.append(
            f"{kind} {name}, post-trained with {method} ({_PAPER}): the "
            "student writes answers of its own, and frozen teachers score them, each shown what its role may see."
        )
        parts.append(_table(("", ""), _facts(config, name, lora, run).items()))
        roles = [_role(config, role) for role in config.roles if config.roles[role].weight]
        parts.append("## Teacher roles")
        parts.append(_table(("role", "sees", "scores", "rollouts", "divergence", "weight", "clip"), roles))
    else:
        adapter = f" with the adapter {pathlib.Path(config.model.adapter).name}" if config.model.adapter else ""
        parts.append(f"{kind} {name}{adapter}, written without a training run.")
    parts += ["## Measured", *_measured(run, report)]
    parts += ["## Not verified", "\n".join(f"- {line}" for line in _unverified(report))]
    parts += ["## Use", f"```python\n{_LOAD_ADAPTER if is_adapter else _LOAD_MERGED}\n```"]
    return "\n\n".join([*parts, f"Written by vigos_jax {__version__}."]) + "\n"


def _base_name(path: str) -> str:
    """A hub id as it is; of a folder its last name, as local paths are not published."""
    return path if _is_on_hub(path) else f"vigos_jax-{path}" if path in WORLDS else pathlib.Path(absolute(path)).name


def _teaches_itself(config) -> bool:
    """Whether every role with a non-zero weight uses the student's own base."""
    return not any(role.get("model", "") for role in config.roles.values() if role.weight)


def _is_on_hub(path: str) -> bool:
    return REPOSITORY.fullmatch(path) is not None and not pathlib.Path(path).expanduser().exists()


def _metadata(config, base: pathlib.Path, family: str, *, is_adapter: bool) -> str:
    """The YAML that the hub reads. A base or data that is not on the hub has no name there."""
    from huggingface_hub import CardData
    from huggingface_hub.repocard import metadata_load

    card = base / "README.md"
    try:
        known = (metadata_load(card) if card.is_file() else None) or {}
    except Exception:  # no front matter of any use: then it gives no license
        known = {}
    data = {k: known[k] for k in _LICENSE if k in known}
    if not data and FAMILIES[family].license:
        data["license"] = FAMILIES[family].license
    if _is_on_hub(config.model.path):
        data["base_model"] = config.model.path
    if _is_on_hub(config.data.source):
        data["datasets"] = [config.data.source]
    data |= {"library_name": "peft" if is_adapter else "transformers", "pipeline_tag": "image-text-to-text"}
    tag = "self-distillation" if _teaches_itself(config) else "distillation"
    return CardData(**data, tags=["vigos", tag]).to_yaml().rstrip("\n") + "\n"


def _facts(config, name: str, lora: LoraSpec | None, run: RunFacts) -> dict[str, str]:
    o, s = config.optimizer, config.sampling
    source = config.data.source
    data = source if _is_on_hub(source) else "rendered by vigos_jax" if source in WORLDS else pathlib.Path(source).name
    if lora:
        alpha = lora.scale * lora.rank
        modules = f"{', '.join(sorted(lora.language))}{' and of the vision MLPs' if lora.vision else ''}"
        trained = f"LoRA of rank {lora.rank}, alpha {alpha:g}, dropout {lora.dropout:g} on {modules}"
    else:
        trained = "all parameters"
    kind = config.model.quantization
    return {
        "base model": name,
        "data": f"{data} ({config.data.split})",
        "trained": trained,
        "steps": f"{run.step} of {config.steps}, {config.batch_size} rows each, seed {config.seed}",
        "optimizer": f"AdamW, {o.learning_rate:g} ({o.schedule}, {o.warmup_steps} warm-up steps), betas {o.b1:g} and "
        f"{o.b2:g}, weight decay {o.weight_decay:g}, gradient norm at most {o.max_grad_norm:g}",
        "rollouts": f"temperature {s.temperature:g}, top-p {s.top_p:g}, top-k {s.top_k}, at most {s.max_tokens} tokens",
        "teachers": f"{config.teacher.weights}; spans as in the {config.span_rule} rule; divergence at temperature "
        f"{config.loss.temperature:g}",
        "computation": config.model.dtype + ("" if kind == "none" else f", the frozen base in {kind}"),
    }


def _role(config, name: str) -> tuple[str, ...]:
    role, known = config.roles[name], {"problem": "question", "reference": "reference answer"}
    names = fields(config.prompts[name].user, (*known, *config.data.fields))
    image, column = role.get("image", "original"), role.get("image_column", "")
    images = {"original": ["image"], "none": [], "other": [f"images of {column}"]}
    seen = images.get(image, [f"{image} of {column}" if column else f"{image} image"])
    sees = [*seen, *(known.get(f, f) for f in sorted(names))] or ["nothing"]
    clip = f"{role.clip:g} per {role.clip_per}" if role.clip else "none"
    who = f"{name}, by {_base_name(model)}" if (model := role.get("model", "")) else name
    rule = role.get("token_weights", "uniform")
    scores = ", ".join(role.scores) + ("" if rule == "uniform" else f", weighed by {rule}")
    return (who, ", ".join(sees), scores, role.when, role.divergence, f"{role.weight:g}", clip)


def _measured(run: RunFacts | None, report: Mapping[str, Any] | None) -> list[str]:
    parts = []
    if report:
        parts.append(
            f"Loaded again from its files, on {report['tokens']} tokens of fixed prompts with a synthetic image: "
            f"KL(student || these files) is {report['kl_mean']:.3g} nats per token on average, {report['kl_max']:.3g} "
            f"at most, and the largest difference of a logit {report['max_logit_difference']:.3g}."
        )
        if "exact" in report:
            parts.append("Merging into bfloat16 rounds; a float32 or adapter export of the same run does not.")
    if run and run.metrics:
        hidden = ("step", "compilations", "bad_rows", "skipped", "skipped_steps", "alerts", "tokens_per_second")
        shown = [(k, v) for k, v in run.metrics.items() if k not in hidden and not k.startswith("seconds/")]
        rows = [(k, "not finite" if v is None else f"{v:.4g}") for k, v in shown]
        parts += [f"On the training rollouts of step {run.metrics['step']}:", _table(("", ""), rows)]
    return parts or ["Nothing."]


def _unverified(report: Mapping[str, Any] | None) -> list[str]:
    files = "The files were not loaded again after they were written."
    if report:
        files = "The comparison of logits shows that the files hold the student, not that the student is any good."
    return [
        files,
        "These weights were not evaluated on a benchmark when they were exported: what training reports of its own "
        "rollouts is not an evaluation.",
        "No other program (transformers, peft, vLLM) was run on these very files.",
        "Safety, bias and behaviour outside the training data were not examined; what holds for the base may not hold "
        "any more.",
    ]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
