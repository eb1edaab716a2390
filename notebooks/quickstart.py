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
# # ViGOS in ten minutes
#
# Vision-language models often answer what they *expect* instead of what the image *shows*. **ViGOS** trains a model
# on its own answers: the model describes, reasons and answers, and frozen copies of its initial weights score each
# part. The copy that scores the description sees **the image alone**, so it cannot be talked into anything.
#
# This notebook trains the small model that ships with the package, on the CPU, and looks inside. A plain CPU runtime is
# enough; training and evaluation take a few minutes on two cores.

# %%
import importlib.util
import pathlib

if importlib.util.find_spec("vigos_jax") is None:  # on Colab, for one
    # In a clone of the repository that is the code next door, anywhere else the published package.
    package = ".." if pathlib.Path("../vigos_jax/__init__.py").exists() else "vigos-jax"
    # %pip install -q "{package}[notebooks]"

# %%
import contextlib
import html
import json
import os
import sys
import warnings

# transformers warns about a missing torch, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore", message="IProgress not found")  # progress is printed, no widgets are needed

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display

from configs import base
from vigos_jax.config import validate
from vigos_jax.demo import world
from vigos_jax.demo.scenes import describe
from vigos_jax.method.packing import pack_prompts
from vigos_jax.method.rows import Rollout, make_row
from vigos_jax.method.scoring import score_batch
from vigos_jax.method.spans import find_spans
from vigos_jax.models.attention_masks import Branches
from vigos_jax.rollouts.sampler import Sampler, row_keys
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.session import load
from vigos_jax.training.checkpoints import Checkpoints
from vigos_jax.training.loop import train

plt.rcParams["figure.dpi"] = 110
plt.rcParams["font.size"] = 9

# %% [markdown]
# ## 1. The demo
#
# The demo's world has twelve kinds of thing, each with a usual color, size and count. A question asks for one of these,
# and half of the questions first say what is usual. In *prior* images the usual answer is right; in *conflict*
# images it is wrong, and only a model that looks can tell.

# %%
examples = [world.item(7, 12, setting="prior"), world.item(7, 4, setting="conflict")]
fig, axes = plt.subplots(1, 2, figsize=(8, 3.2))
for ax, item in zip(axes, examples, strict=True):
    ax.imshow(item.image, interpolation="nearest")
    ax.set_title(item.question.replace("? ", "?\n").replace(". ", ".\n"))
    ax.set_xlabel(f"shown: {item.answer}     usual: {item.prior_value}")
    ax.set(xticks=[], yticks=[])
fig.tight_layout()
plt.show()

# %% [markdown]
# ## 2. The config
#
# One object says everything about a run; [configs/base.py](../configs/base.py) explains its fields, and each can be
# set on the command line, like `--config.steps=10`. The teachers are plain data too: `config.prompts` says what a role
# sees after the image, `config.roles` which part of a rollout it scores. This is all that makes the method:

# %%
config = base.get_config().lock()
config.demo_eval.questions = 250  # of each kind; the command line asks 1,000, which is slower and less noisy
if "VIGOS_NOTEBOOK_STEPS" in os.environ:  # the project's tests run this notebook in short
    config.steps = int(os.environ["VIGOS_NOTEBOOK_STEPS"])
    config.demo_eval.questions = config.demo_eval.batch_size = 20
validate(config)

table = [("role", "sees the image and", "scores", "of rollouts that are", "by", "weight")]
for name, role in config.roles.items():
    sees = config.prompts[name].user.replace("\n", " ↵ ") or "nothing else"
    table.append((name, sees, ", ".join(role.scores), role.when, role.divergence, role.weight))
lines = ""
for i, row in enumerate(table):
    kind = "td" if i else "th"
    cells = (f'<{kind} style="text-align:left">{html.escape(str(value))}</{kind}>' for value in row)
    lines += f"<tr>{''.join(cells)}</tr>"
display(HTML(f"<table>{lines}</table>"))

# %% [markdown]
# ## 3. Train and evaluate
#
# The same call as `python -m vigos_jax.main --config configs/base.py`. Every step samples rollouts from the student,
# parses them, lets the teachers score them and updates the student. The first step compiles. Run the cell again and it
# goes on where it stopped; for a run with another config choose another `workdir`.

# %%
workdir = pathlib.Path("runs/quickstart")
with contextlib.redirect_stderr(sys.stdout):  # progress is not an error
    train(config, workdir)

# %% [markdown]
# ## 4. Base and trained
#
# **Score** is accuracy on conflict images, **Prior** accuracy on images that agree with what is usual, **leak** the
# share of valid descriptions of conflict images that state the usual value instead of the one shown. Score should
# rise, leak should fall, and Prior should stay. Bars are standard errors.

# %%
results = json.loads((workdir / "results.json").read_text())
rates = {"score": "Score ↑", "prior": "Prior", "leak": "leak ↓"}
fig, ax = plt.subplots(figsize=(6, 3))
for k, (name, color) in enumerate({"base": "#9aa5b1", "trained": "#1d6b30"}.items()):
    values = np.array([results[name][rate] for rate in rates])
    error = np.sqrt(values * (1 - values) / results[name]["questions"])
    bars = ax.bar(np.arange(3) + 0.38 * k, values, 0.36, yerr=error, label=name, color=color, ecolor="#444444")
    ax.bar_label(bars, fmt="%.2f", padding=2)
ax.set_xticks(np.arange(3) + 0.19, rates.values())
ax.set_ylim(0, 1.1)
ax.set_ylabel(f"rate, {results['base']['questions']} questions")
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False, loc="upper right")
fig.tight_layout()
plt.show()

# %% [markdown]
# ## 5. Three teachers in one sequence
#
# All teachers are the same frozen weights; only what they may see differs. So a sample's teachers stand in one packed
# sequence: the image once, and behind it a branch per role: its prompt, and the rollout up to the last token it
# scores. `Branches` keeps the branches apart: each sees the image and itself, and nothing of the others.
#
# Which roles score depends on the format. A **valid** rollout is scored by *perception* (its description) and
# *reasoning* (its reasoning and answer), an **invalid** one by *reference* as a whole. Here is one of each, written by
# hand.

# %%
session = load(config, for_training=True)
processor, roles = session.processor, session.roles


def row_of(item):
    image = processor.encode_image(item.pil_image)
    return make_row(
        (image,),
        problem=item.question,
        reference=item.answer,
        student=config.prompts.student.to_dict(),
        roles=roles,
        processor=processor,
    )


def rollout_of(ids):
    return Rollout(tuple(ids), find_spans(processor.token_bytes(ids)))


def pack(rows, rollouts):
    return session.pack_scores(rows, rollouts)


item = examples[1]
good = f" {describe(item.scene.things)} </description> <think> {item.asks.rationale(item.things, item.answer)} </think>"
texts = {
    "valid": good + f" \\boxed{{{item.answer}}}",
    "invalid": good.replace(" </think>", "") + f" \\boxed{{{item.answer}}}",  # the reasoning is never closed
}
written = [rollout_of(processor.encode_text(text) + [processor.eos_ids[0]]) for text in texts.values()]
packed = pack([row_of(item)] * 2, written)
for text, rollout in zip(texts.values(), written, strict=True):
    print(f"valid {rollout.spans.is_valid!s:6}{rollout.spans.invalid_reason or '':16}<description>{text}")

# %% [markdown]
# A row of these images is a token, and colored cells are the tokens it sees. The marks on the right are the rows
# whose next-token distribution is compared, between the student and the teacher of that color.

# %%
COLORS = {"perception": "#2f9e44", "reasoning": "#2f6fd0", "reference": "#d9822b"}
GREY = "#7d8894"


def draw_mask(ax, text, i, *, parts, names, scored, title):
    # parts [T]: which of `names` a token belongs to. It chooses the colors; the mask is the one the model uses.
    n = len(parts)
    mask = np.asarray(Branches(text.segment_ids[i][None, :n]).dense(n))[0]  # [T, T]
    color = np.array([plt.matplotlib.colors.to_rgb(COLORS.get(name, GREY)) for name in names])[parts]  # [T, 3]
    ink = np.where(parts[None] == parts[:, None], 0.8, 0.35)[..., None]  # what lies before the own part is paler
    ax.imshow(np.where(mask[..., None], 1 + ink * (color[:, None] - 1), 1.0), interpolation="nearest", aspect="auto")
    labels = [processor.decode([t]).replace("\n", "\\n").strip(" ") for t in text.ids[i, :n]]
    ax.set_yticks(range(n), labels, fontsize=5.5, family="monospace")
    for label, c in zip(ax.get_yticklabels(), color, strict=True):
        label.set_color(0.7 * c)
    starts = np.searchsorted(parts, range(len(names)))
    ax.set_xticks(starts - 0.5, names, ha="left", fontsize=6.5)
    ax.xaxis.tick_top()
    ax.tick_params(length=0, pad=2)
    for start in starts[1:]:
        ax.axhline(start - 0.5, color="black", lw=0.5)
        ax.axvline(start - 0.5, color="black", lw=0.5)
    for at, role in scored:
        ax.add_patch(plt.Rectangle((n + 0.5, at - 0.5), 2, 1, color=COLORS[role], lw=0, clip_on=False))
    ax.set_title(title, fontsize=10)


fig, axes = plt.subplots(2, 2, figsize=(8.4, 15))
turn = row_of(item).student
for i, (kind, (left, right)) in enumerate(zip(texts, axes, strict=True)):
    e = jax.tree.map(lambda x, i=i: x[i][packed.supervised.role[i] >= 0], packed.supervised)
    who = [roles[r].name for r in e.role]
    lengths = [len(turn.prefix_ids), len(turn.rest_ids), len(written[i].ids)]
    draw_mask(
        left, packed.student, i, parts=np.repeat(range(3), lengths), names=["image", "question", "rollout"],
        scored=zip(e.student_at, who, strict=True), title=f"{kind} rollout: student",
    )  # fmt: skip
    segments = packed.teacher.segment_ids[i]  # 0 is padding, 1 the image, 2 and up the branches
    draw_mask(
        right, packed.teacher, i, parts=segments[segments > 0] - 1, names=["image", *dict.fromkeys(who)],
        scored=zip(e.teacher_at, who, strict=True), title=f"{kind} rollout: teachers",
    )  # fmt: skip
fig.tight_layout()
plt.show()

# %% [markdown]
# ## 6. One rollout, token by token
#
# The trained student now answers 32 conflict questions. Of the valid answers we take the one that the teachers
# objected to most before training, and color each token by the role that scores it. The stronger the color, the larger
# the divergence between that teacher and the student (full color from 1 nat): first with the student as it was, then as
# it is now. Point at a token for the numbers.

# %%
with Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints:
    _, trained = checkpoints.restore_trained(session.trained)

items = [world.item(config.demo_eval.seed + 1, i, setting="conflict") for i in range(32)]
rows = [row_of(item) for item in items]
prompts = pack_prompts(rows, config=session.config, buckets=session.buckets)
sampler = Sampler(session.model, Sampling(**config.sampling), eos_ids=processor.eos_ids)
keys = row_keys(config.seed, 0, len(rows))
sampled = sampler(session.student(trained), session.put_batch(prompts), keys)
rollouts = [rollout_of(ids) for ids in sampled.ids]

batch = pack(rows, rollouts)
score = jax.jit(lambda trained, batch: score_batch(session.model, session.base, trained, batch, session.objective))
on_mesh = session.put_batch(batch)
before, after = (jax.device_get(score(student, on_mesh)) for student in (session.trained, trained))

objection = np.where(batch.supervised.role >= 0, before.divergence, 0).sum(1)  # [B]
is_valid = np.array([r.spans.is_valid for r in rollouts])
chosen = int(np.argmax(np.where(is_valid, objection, -1)))


def colored(scores):
    e = jax.tree.map(lambda x: x[chosen], batch.supervised)
    entry_of = {int(e.position[k]): k for k in np.flatnonzero(e.role >= 0)}
    spans = []
    for position, token in enumerate(rollouts[chosen].ids):
        text, style, tip = html.escape(processor.decode([token])), "color:#8a8a8a", "no role scores this token"
        if position in entry_of:
            k = entry_of[position]
            name, kl = roles[e.role[k]].name, float(scores.divergence[chosen, k])
            strength = round(255 * min(1.0, kl) ** 0.5)  # full color at 1 nat
            style = f"color:#111;background:{COLORS[name]}{strength:02x};border-bottom:2px solid {COLORS[name]}"
            student, teacher = np.exp(scores.student_logp[chosen, k]), np.exp(scores.teacher_logp[chosen, k])
            tip = f"{name}: KL {kl:.3f} nats; probability of this token {student:.2f} student, {teacher:.2f} teacher"
        spans.append(f'<span style="{style}" title="{html.escape(tip)}">{text}</span>')
    return "".join(spans)


item = items[chosen]
key = " ".join(f'<span style="border-bottom:2px solid {c}">{name}</span>' for name, c in COLORS.items())
lines = "".join(
    f'<div style="margin:8px 0"><b>{title}</b><br><code style="white-space:pre-wrap">{colored(scores)}</code></div>'
    for title, scores in (("before training", before), ("after training", after))
)
display(HTML(
    '<div style="background:#fff;color:#111;padding:10px;line-height:1.8;max-width:60em">'
    f"<b>{html.escape(item.question)}</b> shown: {item.answer}, usual: {item.prior_value}<br>{key}{lines}</div>"
))  # fmt: skip

# %% [markdown]
# ## 7. Where to go from here
#
# - [own_data.ipynb](own_data.ipynb): your own rows and a Qwen3.5 checkpoint, on a GPU or TPU. -
# [palr.ipynb](palr.ipynb): where the answer leaks into a teacher's correction, and where it cannot. -
# [export.ipynb](export.ipynb): the trained student in transformers. This run has left a full Hugging Face checkpoint
# in   `runs/quickstart/export` already.
#
# On the command line, a run of your own is a config file that starts from one of ours and changes what differs,
# `mine.py` for one:
#
# ```python
# from configs import qwen2_5_vl_3b
#
# def get_config():
#     config = qwen2_5_vl_3b.get_config()
#     config.data.source = "mine.jsonl"  # rows {"problem": ..., "answer": ..., "images": ["cat.png"]}
#     return config
# ```
#
# ```
# python -m vigos_jax.main --config mine.py --workdir runs/mine
# ```
#
# [docs/roles.md](../docs/roles.md) shows how to make a teacher of your own in ten lines.
