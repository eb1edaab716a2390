"""Our scoring and backward pass against a plain PyTorch step on the same weights and tokens.

The PyTorch step is what one would write with transformers and peft: four forward passes (the student, and the base for
each role), scaled-dot-product attention, logits for the completion only, the loss, `backward()`.
"""

import dataclasses
import functools
import warnings

import jax
import numpy as np

from benchmarks import models
from benchmarks.harness import Result, race
from benchmarks.teachers import make_batches
from vigos_jax.method.losses import ObjectiveConfig
from vigos_jax.models.families import adapter_table, tensor_table
from vigos_jax.weights import writing

ROWS = 2
CONTROL = {
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "image_token_id": models.IMAGE,
    "vision_start_token_id": models.VISION_START, "vision_end_token_id": models.VISION_END,
}  # fmt: skip


def transformers_config(config, control):
    """transformers' config of a model of ours. control: ids of control tokens, by their names in config.json."""
    from transformers import Qwen2_5_VLConfig

    v = config.vision
    text_control = {name: control[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "intermediate_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": config.rope_theta, "mrope_section": list(config.mrope_section),
            },
            "rms_norm_eps": config.rms_eps,
            **text_control,
        },
        vision_config={
            "depth": v.depth, "hidden_size": v.hidden_size, "num_heads": v.num_heads,
            "intermediate_size": v.intermediate_size, "out_hidden_size": v.out_hidden_size,
            "window_size": v.window_size, "fullatt_block_indexes": list(v.full_attention_blocks),
        },
        **{name: id for name, id in control.items() if name not in text_control},
        tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip


def torch_base(config, variables, settings, *, dtype=np.float32, device="cpu"):
    """transformers' model with these settings, holding our base weights.

    Args:
      dtype: numpy's, of the weights: float32 or bfloat16.
    """
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(settings, dtype=getattr(torch, np.dtype(dtype).name))
    model.requires_grad_(False)
    published = lambda k: k.replace("model.language_model.", "model.").replace("model.visual.", "visual.")  # noqa: E731
    own = {published(k): x for k, x in model.state_dict().items()}
    with torch.no_grad():
        for name, x in writing.file_tensors(variables["params"], tensor_table(config), config, dtype=dtype):
            x = np.array(x)  # torch's own bfloat16 is not numpy's
            x = (
                torch.from_numpy(x)
                if x.dtype == np.float32
                else torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
            )
            own.pop(name).copy_(x)
    assert set(own) <= {"lm_head.weight"}, sorted(own)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model


def with_adapters(model, config, variables):
    """transformers' model with peft adapters, holding our adapters' weights."""
    import peft
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        names = "|".join(sorted(models.LORA.language))
        lora = peft.LoraConfig(
            r=models.LORA.rank, lora_alpha=models.LORA.rank * models.LORA.scale,
            target_modules=rf".*language_model.*\.({names})",
        )  # fmt: skip
        adapted = peft.get_peft_model(model, lora)
    adapters = dict(
        writing.file_tensors(variables["lora"], adapter_table(config, models.LORA), config, dtype=np.float32)
    )
    parameters = {k.replace(".default", ""): p for k, p in adapted.named_parameters() if "lora_" in k}
    strip = lambda k: k.replace("language_model.", "")  # noqa: E731
    by_name = {strip(k): p for k, p in parameters.items()}
    assert len(by_name) == len(adapters)
    with torch.no_grad():
        for name, x in adapters.items():
            by_name[strip(name)].copy_(torch.tensor(x))
    return adapted


def _torch_step(model, rows, rollouts, masks):
    """Returns a function that runs the step once and gives (loss, {name: gradient})."""
    import torch

    length = len(rollouts[0].ids)
    pixels = torch.tensor(np.concatenate([image.patches for row in rows for image in row.images]))
    grids = torch.tensor([image.grid for row in rows for image in row.images])
    turns = [(row.student, *row.teachers) for row in rows]
    ids = [torch.tensor([t[k].ids + r.ids for t, r in zip(turns, rollouts, strict=True)]) for k in range(4)]
    masks = torch.tensor(masks)

    def log_probs(i):
        out = model(
            input_ids=ids[i], attention_mask=torch.ones_like(ids[i]), pixel_values=pixels, image_grid_thw=grids,
            mm_token_type_ids=(ids[i] == models.IMAGE).int(), logits_to_keep=length + 1, use_cache=False,
        )  # fmt: skip
        return torch.log_softmax(out.logits[:, :-1].float(), -1)

    def step():
        for p in model.parameters():
            p.grad = None
        with torch.no_grad(), model.disable_adapter():
            teachers = [log_probs(i) for i in (1, 2, 3)]
        student, loss = log_probs(0), 0.0
        for r, log_q in enumerate(teachers):
            a, b = (student, log_q) if r == 2 else (log_q, student)
            kl = (a.exp() * (a - b)).sum(-1)
            loss = loss + models.ROLES[r].weight * (kl * masks[r]).sum() / masks[r].sum().clamp(min=1)
        loss.backward()
        return loss.item()

    return step


def torch() -> Result:
    import torch

    torch.set_num_threads(2)
    config, variables = models.MID_SIZE, models.weights(models.MID_SIZE)
    base, trained = variables["params"], {"lora": variables["lora"]}
    roles = tuple(dataclasses.replace(r, clip=0.0) for r in models.ROLES)  # random weights would all be clipped
    b = make_batches(config, models.THIRD, rows=ROWS, roles=roles)
    model = models.model(config)

    def loss(trained, base, batch):
        return models.loss(model, base, trained, batch, ObjectiveConfig(roles, chunk=32))

    ours = jax.jit(jax.value_and_grad(loss))
    rows, rollouts = models.samples(config, models.THIRD, rows=ROWS)
    settings = transformers_config(config, CONTROL | {"video_token_id": config.vocab_size - 1})
    adapted = with_adapters(torch_base(config, variables, settings), config, variables)
    step = _torch_step(adapted, rows, rollouts, b.masks)
    theirs, mine = step(), float(ours(trained, base, b.packed)[0])
    assert abs(theirs - mine) < 1e-4 * max(1.0, abs(theirs)), (theirs, mine)
    r = race(step, functools.partial(ours, trained, base, b.packed))
    tokens = sum(int(np.sum(x.student.segment_ids > 0)) for x in b.each)
    detail = (
        ("PyTorch", f"{r.baseline:.2f} s, {tokens} tokens in four passes, loss {theirs:.6f}"),
        ("ours", f"{r.ours:.2f} s, loss {mine:.6f}"),
    )
    what = f"scoring and backward pass against transformers + peft, 100 M parameters, {ROWS} rows"
    return Result("torch", what, r.ratio, 1.5, r.spread, detail)
