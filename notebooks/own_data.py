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
# # Your own data, a Qwen3.5 checkpoint
#
# From rows of your own to a trained checkpoint, by the commands you would type in a terminal. The model has 0.85
# billion parameters, 1.7 GB in bfloat16: by `--mode plan` the run takes 6 of the 16 GB of a TPU v5e chip or a T4, as
# Colab has them. (None was at hand to measure it.) To try the notebook on a CPU first, set `MODEL = "tiny"`: random
# weights of the same architecture, which answer nonsense but go through every step.

# %%
import os

MODEL = os.environ.get("VIGOS_NOTEBOOK_MODEL", "Qwen/Qwen3.5-0.8B")  # a hub id, a folder, or "tiny"

# %%
import importlib.util
import pathlib
import shutil

if importlib.util.find_spec("vigos_jax") is None:  # on Colab, for one
    device = ",cuda" if shutil.which("nvidia-smi") else ",tpu" if pathlib.Path("/dev/vfio").exists() else ""
    # In a clone of the repository that is the code next door, anywhere else the published package.
    package = ".." if pathlib.Path("../vigos_jax/__init__.py").exists() else "vigos-jax"
    # %pip install -q "{package}[notebooks{device}]"

# %%
import contextlib
import json
import shlex
import sys
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress is printed, no widgets are needed

import jax
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

from vigos_jax.main import main

plt.rcParams["figure.dpi"] = 110
plt.rcParams["font.size"] = 9
print(f"{jax.device_count()} device(s): {jax.devices()[0].device_kind}")


def vigos(command):
    """As `python -m vigos_jax.main COMMAND` in a terminal."""
    with contextlib.redirect_stderr(sys.stdout):  # progress is not an error
        code = main(["vigos_jax", *shlex.split(command)])
    assert code == 0, f"exit code {code}"


# %% [markdown]
# ## 1. Rows
#
# A row has a question, an answer and an image. Here they are bar charts, drawn on the spot; put your own in their
# place. A `.jsonl` names its images by paths inside its folder; parquet and hub data sets work as well.

# %%
folder = pathlib.Path("data")
folder.mkdir(exist_ok=True)
COLORS = ("red", "orange", "gold", "green", "blue", "purple")


def draw(rng):
    """A chart of four bars, and which of them is the tallest."""
    image = Image.new("RGB", (224, 224), "white")
    pen = ImageDraw.Draw(image)
    names, heights = rng.permutation(COLORS)[:4], rng.permutation([60, 100, 140, 180]) + rng.integers(-15, 16, 4)
    for k, (name, height) in enumerate(zip(names, heights, strict=True)):
        pen.rectangle([20 + 50 * k, 210 - int(height), 50 + 50 * k, 210], fill=str(name))
    pen.line([10, 211, 214, 211], fill="black", width=2)
    return image, str(names[np.argmax(heights)])


rows = []
for i in range(48):
    image, answer = draw(np.random.default_rng(i))
    image.save(folder / f"{i}.png")
    rows.append({"id": str(i), "images": [f"{i}.png"], "problem": "Which bar is the tallest?", "answer": answer})
(folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

fig, axes = plt.subplots(1, 4, figsize=(9, 2.6))
for ax, row in zip(axes, rows, strict=False):
    ax.imshow(Image.open(folder / row["images"][0]))
    ax.set_title(f"{row['problem']}\n{row['answer']}")
    ax.set(xticks=[], yticks=[])
fig.tight_layout()
plt.show()

# %% [markdown]
# ## 2. The config
#
# A file that says what differs from a shipped config; here from the paper's settings, sized for one small device.
# [configs/base.py](../configs/base.py) explains every field.

# %%
# %%writefile my_run.py
from configs import one_device_qwen3_5_0_8b


def get_config():
    config = one_device_qwen3_5_0_8b.get_config()
    config.data.source = "data/train.jsonl"
    config.steps = 20
    config.batch_size = 16  # a multiple of the devices times accumulation
    config.gradient_accumulation_steps = 16  # fewer are faster and need more memory; the result is the same
    config.checkpoint_every = 10
    config.optimizer.learning_rate = 2e-5  # the paper's 5e-6 is for 1,488 steps
    config.sampling.max_tokens = 512
    config.export.after_training = False
    return config


# %% [markdown]
# Flags change fields for once. `tiny` needs small sizes, and a checkpoint, which we make: this package writes Hugging
# Face folders, of random weights too.

# %%
options = f"--config my_run.py --config.model.path={MODEL}"

if MODEL == "tiny":
    import copy

    from configs import base
    from vigos_jax.miniature.assets import write_assets
    from vigos_jax.models.config import ModelConfig
    from vigos_jax.models.families import tensor_table
    from vigos_jax.models.published_configs import published_config
    from vigos_jax.models.vlm import VisionLanguageModel, init_variables
    from vigos_jax.weights.writing import file_tensors, save_sharded

    checkpoint = pathlib.Path("tiny-qwen3_5")
    write_assets(checkpoint, world="demo", templates=[prompt.user for prompt in base.get_config().prompts.values()])

    # Few and narrow layers, and the demo's tokenizer.
    demo = json.loads((checkpoint / "config.json").read_text())
    small = copy.deepcopy(published_config("Qwen/Qwen3.5-0.8B"))
    small |= {name: value for name, value in demo.items() if name.endswith("_token_id")}
    text, vision = small["text_config"], small["vision_config"]
    text |= {name: demo[name] for name in ("vocab_size", "eos_token_id")}
    text |= {"hidden_size": 64, "intermediate_size": 128}
    text |= {"num_hidden_layers": 2, "layer_types": text["layer_types"][2:4], "num_attention_heads": 4, "head_dim": 32}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    text["rope_parameters"]["mrope_section"] = [2, 1, 1]
    vision |= {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
    pixels = json.loads((checkpoint / "preprocessor_config.json").read_text()) | {"patch_size": 16}
    for name, values in {"config": small, "preprocessor_config": pixels}.items():
        (checkpoint / f"{name}.json").write_text(json.dumps(values))
    shape = ModelConfig.load(checkpoint)
    params = init_variables(VisionLanguageModel(shape), jax.random.key(0))["params"]
    tensors = file_tensors(params, tensor_table(shape), shape, dtype=np.float32)
    save_sharded(checkpoint, tensors, max_shard_bytes=2**30)
    options = f"--config my_run.py --config.model.path={checkpoint} --config.model.dtype=float32"
    options += (
        " --config.steps=2 --config.batch_size=4 --config.gradient_accumulation_steps=1 --config.sampling.max_tokens=32"
    )
    options += " --config.model.remat=none --config.lora.rank=4 --config.data.max_pixels=9216"

# %% [markdown]
# ## 3. Look before you train
#
# Does the base keep to the format, `description`, `think`, `boxed`? A rollout that does not has no parts, and is
# scored by the *reference* role alone, which teaches the format.

# %%
question = shlex.quote(rows[0]["problem"])
look = f"--mode generate --config.generate.image=data/0.png --config.generate.question={question}"
vigos(f"{options} {look}")

# %% [markdown]
# ## 4. Train
#
# The first step compiles. Run the cell again and it goes on from its last checkpoint.

# %%
vigos(f"{options} --workdir runs/mine")

# %% [markdown]
# ## 5. What happened
#
# One row per step in `metrics.jsonl`. `valid_rate` is the share of rollouts in the right format, `accuracy` that of
# right answers, and each role has the mean divergence over its own tokens.

# %%
metrics = [json.loads(line) for line in pathlib.Path("runs/mine/metrics.jsonl").read_text().splitlines()]
steps = [row["step"] for row in metrics]
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
for name, color in {"perception": "#2f9e44", "reasoning": "#2f6fd0", "reference": "#d9822b"}.items():
    seen = [row[f"{name}/loss"] if row[f"{name}/tokens"] else np.nan for row in metrics]
    left.plot(steps, seen, "o-", ms=3, color=color, label=name)
for name, color in {"valid_rate": "#555555", "accuracy": "#9c36b5"}.items():
    seen = [row.get(name) for row in metrics]
    right.plot(steps, seen, "o-", ms=3, color=color, label=name.replace("_", " "))
left.set(title="mean divergence, nats per token", xlabel="step", ylim=(0, None))
right.set(title="share of rollouts", xlabel="step", ylim=(-0.05, 1.05))
for ax in (left, right):
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
fig.tight_layout()
plt.show()

# %% [markdown]
# ## 6. Ask the student, and take it with you
#
# With `--workdir` every other mode takes the trained student. The export is a full Hugging Face checkpoint;
# `kind=adapter` writes a PEFT LoRA instead, which [export.ipynb](export.ipynb) loads into transformers.

# %%
vigos(f"--config my_run.py --workdir runs/mine {look}")

# %%
shutil.rmtree("my_model", ignore_errors=True)
vigos("--config my_run.py --workdir runs/mine --mode export --config.export.output=my_model")
for path in sorted(pathlib.Path("my_model").iterdir()):
    print(f"{path.stat().st_size / 1024:12,.1f} KB  {path.name}")

# %% [markdown]
# Where to go from here: [palr.ipynb](palr.ipynb) measures how much the answer leaks; `--mode eval` runs benchmarks;
# [docs/roles.md](../docs/roles.md) shows how to make teachers of your own,
# [docs/troubleshooting.md](../docs/troubleshooting.md) what to do when memory runs out or the format gets lost.
