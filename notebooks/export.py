# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From JAX to transformers
#
# A trained student becomes a Hugging Face folder, or a PEFT adapter, that PyTorch programs load like any other. We
# train an adapter for the demo's small model, export it both ways, and let transformers answer. A CPU and a minute or
# two will do.

# %%
import importlib.util
import pathlib

if importlib.util.find_spec("vigos_jax") is None:  # on Colab, for one
    # In a clone of the repository that is the code next door, anywhere else the published package.
    package = ".." if pathlib.Path("../vigos_jax/__init__.py").exists() else "vigos-jax"
    # %pip install -q "{package}[notebooks]" torch peft

# %%
import contextlib
import io
import os
import shlex
import shutil
import sys
import textwrap
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress is printed, no widgets are needed

import matplotlib.pyplot as plt
import peft
import torch
import transformers
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from configs import base
from vigos_jax.demo import world
from vigos_jax.main import main

plt.rcParams["figure.dpi"] = 110
plt.rcParams["font.size"] = 9
transformers.logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning)  # between peft and transformers
STEPS = int(os.environ.get("VIGOS_NOTEBOOK_STEPS", 20))  # the project's tests take fewer


def vigos(command):
    """As `python -m vigos_jax.main COMMAND` in a terminal."""
    with contextlib.redirect_stderr(sys.stdout):  # progress is not an error
        code = main(["vigos_jax", *shlex.split(command)])
    assert code == 0, f"exit code {code}"


# %% [markdown]
# ## 1. Train an adapter
#
# LoRA of rank 8 beside the frozen weights. Its weights are float32, whatever the base has.

# %%
vigos(f"--config configs/base.py --workdir runs/adapter --config.steps={STEPS} --config.lora.rank=8 "
      "--config.lora.alpha=16 --config.demo_eval.questions=0 --config.export.after_training=False")  # fmt: skip

# %% [markdown]
# ## 2. Export
#
# `merged` adds the adapter to the weights and writes a full checkpoint, `adapter` writes the adapter alone. The check
# loads what was written again and compares it with the student: KL in nats per token.

# %%
for kind in ("merged", "adapter"):
    shutil.rmtree(f"my_{kind}", ignore_errors=True)
    vigos(f"--config configs/base.py --workdir runs/adapter --mode export --config.export.kind={kind} "
          f"--config.export.output=my_{kind} --config.export.check=true")  # fmt: skip
    for path in sorted(pathlib.Path(f"my_{kind}").iterdir()):
        print(f"{path.stat().st_size / 1024:10.1f} KB  {path.name}")

# %% [markdown]
# ## 3. Ask transformers
#
# From here on it is PyTorch. The prompt is the one the student was trained with: the image, the question with the
# format, and a turn of the assistant that begins with `<description>`.

# %%
model = Qwen2_5_VLForConditionalGeneration.from_pretrained("my_merged", dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained("my_merged")
image_processor = AutoImageProcessor.from_pretrained("my_merged", backend="pil")
student = base.get_config().prompts.student


@torch.no_grad()
def answer(model, item):
    vision = image_processor(images=[item.pil_image], return_tensors="pt")
    text = student.user.replace("{problem}", item.question)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    prompt = tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    tokens = int(vision["image_grid_thw"].prod()) // image_processor.merge_size**2  # what the image becomes
    prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * tokens) + student.assistant_prefill
    inputs = tokenizer(prompt, return_tensors="pt")
    is_image = (inputs["input_ids"] == model.config.image_token_id).int()
    out = model.generate(**inputs, **vision, mm_token_type_ids=is_image, do_sample=False, max_new_tokens=48)
    said = out[0, inputs["input_ids"].shape[1] :]
    return student.assistant_prefill + tokenizer.decode(said, skip_special_tokens=True)


items = [world.item(3, i, setting=setting) for i, setting in enumerate(("prior", "conflict", "conflict"))]
answers = [answer(model, item) for item in items]
fig, axes = plt.subplots(1, 3, figsize=(9, 3.8))
for ax, item, text in zip(axes, items, answers, strict=True):
    ax.imshow(item.image, interpolation="nearest")
    ax.set_title(item.question.replace(". ", ".\n"))
    ax.set_xlabel("\n".join(textwrap.wrap(text, 36)), fontsize=8, loc="left", family="monospace")
    ax.set(xticks=[], yticks=[])
fig.tight_layout()
plt.show()

# %% [markdown]
# ## 4. The same words
#
# Both programs read the same folder, so at temperature 0 they must say the same. And the base of the demo with the PEFT
# adapter on top must say it too.

# %%
items[0].pil_image.save("cat.png")
question = shlex.quote(items[0].question)
said = io.StringIO()
with contextlib.redirect_stdout(said):
    vigos("--mode generate --config.model.path=my_merged --config.sampling.temperature=0 "
          f"--config.generate.image=cat.png --config.generate.question={question}")  # fmt: skip
print("vigos_jax    ", said.getvalue().strip())
print("transformers ", answers[0].strip())
assert said.getvalue().strip() == answers[0].strip()

demo = world.WORLDS["demo"].base  # the folder that is the base of this run
with_adapter = Qwen2_5_VLForConditionalGeneration.from_pretrained(demo, dtype=torch.float32)
with_adapter = peft.PeftModel.from_pretrained(with_adapter, "my_adapter").eval()
assert [answer(with_adapter, item) for item in items] == answers
print("peft          the same answers to all three")

# %% [markdown]
# A model of billions of parameters is exported in the same way: the weights are written in shards as they are read
# from the devices. `--config.export.dtype=bfloat16` halves the size and rounds away part of a small update; the export
# then says what that costs. `--config.export.push_to=owner/name` uploads the folder, privately.
