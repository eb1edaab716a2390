"""Verifies an export: its files are loaded again, and their logits compared with those of the student in memory.

Both sides compute in float32, so any difference comes from rounding the written weights, not from the computation.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vigos_jax.data.processor import Processor
from vigos_jax.errors import InputError
from vigos_jax.method.batch import PromptBatch
from vigos_jax.method.packing import Buckets, pack_prompts, slot_count
from vigos_jax.method.rows import Row, make_row
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.layers import LoraSpec
from vigos_jax.models.quantization import has_quantised
from vigos_jax.models.variables import Variables
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.runtime.sharding import replicated, tree_shardings
from vigos_jax.session import Session
from vigos_jax.weights import adapters, reading

# Question and answer: the logits of an answer's tokens are compared too.
PROMPTS = (
    ("What shape is in the middle of the image?", "A square on a ramp of grey.</description> <think> It has four"),
    ("Which color is the square?\nA. red\nB. green", "The square is red.</description> <think> So the answer is A."),
    ("1 + 2 = ?", "There are no numbers in it.</description> <think> 1 + 2 is 3. </think> \\boxed{3}"),
)
# Nats per token: the most that merging may cost in float32, and a bound far above the rounding to bfloat16.
LIMITS = {"float32": 1e-4, "bfloat16": 0.5}


def compare(session: Session, trained: Variables, config, folder: pathlib.Path) -> dict[str, Any]:
    """Reloads an export with this program's own reader and compares it with the student, on a few fixed prompts.

    A merged export's weights stand beside the base's in the devices' memory while this runs.

    Args:
      folder: what was written, as `config.export` describes it.

    Returns:
      `tokens`, `max_logit_difference`, `kl_mean` and `kl_max` of KL(student || reloaded) in nats per token, and what
      was compared; of a merge into bfloat16 also the `exact` choices.

    Raises:
      InputError: they are too different to be the same model.
    """
    e = config.export
    if e.kind == "adapter":
        spec, processor = adapters.adapter_spec(folder, dropout=0.0), session.processor
        written, dtype = session.config, "float32"
    else:
        switches = session.processor.chat_template_kwargs
        spec, processor = None, Processor.load(folder, chat_template_kwargs=switches)
        written, dtype = reading.load_config(folder), e.dtype
    model = _float32_model(written, spec)
    abstract = abstract_variables(model)
    shardings = tree_shardings(abstract, session.mesh, config.mesh.rules)
    if spec is None:
        params = reading.load_params(
            folder, written, abstract["params"], dtype=jnp.dtype(dtype), shardings=shardings["params"]
        )
        reloaded = {"params": params}
    else:
        lora = adapters.load_adapter(folder, written, spec, abstract["lora"], shardings=shardings["lora"])
        reloaded = {"params": session.base, "lora": lora}

    rows = prompt_rows(processor, config.prompts.student)
    if [row.student for row in rows] != [row.student for row in prompt_rows(session.processor, config.prompts.student)]:
        raise InputError(f"the tokenizer of the export in {folder} must write the base's tokens, and writes others")
    batch, mask = pack(rows, written)
    batch = jax.device_put(batch, replicated(session.mesh))
    student = _float32_model(session.config, session.model.lora)
    with jax.default_matmul_precision("float32"):
        run = jax.jit(functools.partial(_differences, student, model, mask.shape[1]))
        difference, kl = (np.asarray(x)[mask] for x in run(session.student(trained), reloaded, batch))
    report = {
        "kind": e.kind,
        "dtype": dtype,
        "tokens": int(mask.sum()),
        "max_logit_difference": float(difference.max()),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
    }
    # With a quantised base, the student and its merge into the original weights differ by the quantisation error.
    limit = LIMITS["bfloat16" if e.kind == "merged" and has_quantised(session.base) else dtype]
    if not report["kl_mean"] <= limit or not np.isfinite(difference).all():
        raise InputError(
            f"the export must say what the student says: KL(student || reloaded) is {report['kl_mean']:.3g} nats "
            f"per token, more than {limit} for {dtype}; nothing was written to config.export.output"
        )
    if e.kind == "merged" and dtype == "bfloat16" and "lora" in trained:
        report["exact"] = ["config.export.dtype=float32", "config.export.kind=adapter"]
    return report


def prompt_rows(processor: Processor, student) -> list[Row]:
    """PROMPTS as the student reads them, with an image that is drawn here."""
    pixels = np.linspace(0, 255, 224, dtype=np.uint8)[None, :, None].repeat(224, 0).repeat(3, 2)
    pixels[72:152, 72:152] = (200, 30, 30)
    image = processor.encode_image(Image.fromarray(pixels))
    return [
        make_row(
            (image,),
            problem=question,
            student={"user": student.user, "assistant_prefill": student.assistant_prefill + answer},
            processor=processor,
        )
        for question, answer in PROMPTS
    ]


def pack(rows: list[Row], config: ModelConfig) -> tuple[PromptBatch, np.ndarray]:
    """The rows as one batch, and which of its last n positions are text after the image, bool [B, n]."""
    buckets = Buckets(
        patches=(max(slot_count(row, config) for row in rows),),
        prompt=(max(len(row.prompt.ids) for row in rows),),
        completion=(1,),
        sequence=(1,),
    )
    lengths = np.array([len(row.prompt.rest_ids) for row in rows])
    mask = np.arange(lengths.max())[::-1] < lengths[:, None]  # prompts end together
    return pack_prompts(rows, config=config, buckets=buckets), mask


def _float32_model(config: ModelConfig, lora: LoraSpec | None) -> VisionLanguageModel:
    return VisionLanguageModel(config, lora=lora, dtype=jnp.float32)


def _differences(a: VisionLanguageModel, b: VisionLanguageModel, last: int, student, reloaded, batch: PromptBatch):
    """Of each of the last positions, [B, last]: largest difference of a logit, and KL(student || reloaded)."""
    logits: list[jax.Array] = []
    for model, variables in ((a, student), (b, reloaded)):
        apply: Any = functools.partial(model.apply, variables)
        images = apply(batch.vision, method="encode_images")
        hidden, _ = apply(batch.text, images)
        logits.append(apply(hidden[:, -last:], method="logits"))  # [B, last, V]
    p, q = (jax.nn.log_softmax(x) for x in logits)
    kl = jnp.sum(jnp.exp(p) * (p - q), -1)
    return jnp.max(jnp.abs(logits[0] - logits[1]), -1), jnp.maximum(kl, 0.0)  # rounding may make a zero negative
