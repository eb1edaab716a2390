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
# # See the leak
#
# A teacher that knows the answer corrects the student, token by token. Some of a correction comes from the image,
# some from the answer the teacher was told. The *privileged-answer leakage ratio* (PALR) says how much: each
# correction is measured again with wrong answers in the teacher's prompt, and with another image in front of it.
#
# We train the demo's model twice, by **ViGOS** and by plain on-policy self-distillation (**OPSD**) with the same
# prompts and rollouts, and look where the answer gets into the correction. A CPU will do; it takes about five minutes
# on two cores.

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
import shlex
import sys
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress is printed, no widgets are needed

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display

from vigos_jax.analysis.palr import GROUPS, Sums, interval, ratio, total
from vigos_jax.demo import world
from vigos_jax.main import main

plt.rcParams["figure.dpi"] = 110
plt.rcParams["font.size"] = 9
STEPS, ROWS = 80, 300
if "VIGOS_NOTEBOOK_STEPS" in os.environ:  # the project's tests run this notebook in short
    STEPS, ROWS = int(os.environ["VIGOS_NOTEBOOK_STEPS"]), 12
METHODS = {"ViGOS": "base", "OPSD": "opsd_same_prompt"}  # the shipped configs they are


def vigos(command):
    """As `python -m vigos_jax.main COMMAND` in a terminal."""
    with contextlib.redirect_stderr(sys.stdout):  # progress is not an error
        code = main(["vigos_jax", *shlex.split(command)])
    assert code == 0, f"exit code {code}"


# %% [markdown]
# ## 1. Two ways to teach
#
# The difference is a table. ViGOS has three teachers, and the one that scores descriptions is shown neither question
# nor answer. OPSD has one, which knows the answer and scores every token.

# %%
for method, name in METHODS.items():
    print(method)
    vigos(f"--config configs/{name}.py --workdir runs/palr-{name} --config.steps={STEPS} "
          "--config.demo_eval.questions=0 --config.export.after_training=False")  # fmt: skip

# %% [markdown]
# ## 2. Measure
#
# `--mode diagnose` samples rollouts of the trained student, here for images that contradict what one expects, scores
# them under every counterfactual, and writes `palr.jsonl`: for each token the strength `s` of its correction, what the
# right answer adds (`c_answer`), and what the right image adds (`c_image`). `palr.html` in the same folder shows the
# rollouts.

# %%
for method, name in METHODS.items():
    print(f"\n{method}")
    vigos(f"--config configs/{name}.py --workdir runs/palr-{name} --mode diagnose --config.diagnose.rows={ROWS}")

# %% [markdown]
# ## 3. Where the answer gets in
#
# PALR of a group of tokens is Σ s·c_answer / Σ s·(c_answer + c_image): 0 if the corrections hang on the image alone,
# 1 if they hang on the answer alone. For ViGOS's descriptions it is 0 by construction: that teacher never heard an
# answer. Grey lines are 95 % bootstrap intervals over rollouts.


# %%
def rollouts_of(name):
    lines = pathlib.Path(f"runs/palr-{name}/diagnose/palr.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def sums(rollout, parts):
    """What `ratio` divides, over the tokens of these parts."""
    ranges = [range(len(rollout["s"]))] if parts == ("completion",) else [
        range(*span) for part in parts for span in rollout["spans"][part]
    ]  # fmt: skip
    tokens = [j for span in ranges for j in span if rollout["s"][j] is not None]
    s, a, i = (np.array([rollout[key][j] for j in tokens]) for key in ("s", "c_answer", "c_image"))
    return Sums(np.sum(s * a), np.sum(s * i), s.sum(), a.sum(), i.sum(), len(tokens))


TITLES = {"T_d": "description", "T_ra": "reasoning and answer", "T_y": "all tokens"}
fig, ax = plt.subplots(figsize=(7, 2.8))
for k, (method, color) in enumerate({"ViGOS": "#1d6b30", "OPSD": "#c0392b"}.items()):
    rollouts = rollouts_of(METHODS[method])
    table = {group: [sums(r, parts) for r in rollouts] for group, parts in GROUPS.items()}
    values = np.array([ratio(total(table[group])) for group in TITLES])
    bounds = np.array([interval(table[group], seed=0) for group in TITLES]).T
    print(f"{method:8}", *(f"{value:.4f}" for value in values))
    error = np.abs(bounds - values)
    at = np.arange(len(TITLES)) + 0.38 * k
    bars = ax.barh(at, values, 0.36, xerr=error, color=color, ecolor="#555555", label=method)
    for y, value, high in zip(at, values, bounds[1], strict=True):
        ax.text(max(value, high) + 0.015, y, f"{value:.2f}", va="center")
ax.set_yticks(np.arange(len(TITLES)) + 0.19, TITLES.values())
ax.invert_yaxis()
ax.set(xlim=(0, 1.1), xlabel="share of the correction that hangs on the answer (PALR)")
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 1.15), ncols=2)
fig.tight_layout()
plt.show()

# %% [markdown]
# ## 4. Token by token
#
# The same question, answered by both students. Red tokens are corrected because of the answer, blue ones because of the
# image, the stronger the color the more; grey ones have no teacher. Point at a token for the numbers.

# %%
RED, BLUE = np.array([220, 70, 50]), np.array([50, 110, 220])


def colored(rollout):
    force = [(s or 0) * ((a or 0) + (i or 0)) for s, a, i in zip(*(rollout[k] for k in KEYS), strict=True)]
    out = []
    for j, token in enumerate(rollout["tokens"]):
        s, a, i = (rollout[key][j] for key in KEYS)
        style, tip = "color:#8a8a8a", "no teacher scores this token"
        if s is not None:
            share = a / (a + i) if a + i > 0 else 0.5
            r, g, b = (share * RED + (1 - share) * BLUE).astype(int)
            strength = 0.75 * (force[j] / max(max(force), 1e-9)) ** 0.5
            style = f"color:#111;background:rgba({r},{g},{b},{strength:.2f})"
            tip = f"{rollout['role'][j]}: correction {s:.2f}, answer {a:.2f}, image {i:.2f}"
        out.append(f'<span style="{style}" title="{html.escape(tip)}">{html.escape(token)}</span>')
    return "".join(out)


KEYS = ("s", "c_answer", "c_image")
both = {method: {r["id"]: r for r in rollouts_of(name)} for method, name in METHODS.items()}
common = sorted(set(both["ViGOS"]) & set(both["OPSD"]))
# The question whose description OPSD's teacher corrects most because of the answer.
chosen = max(common, key=lambda id: sums(both["OPSD"][id], ("description",))[0])
setting, seed, index = chosen.split("-")
item = world.item(int(seed), int(index), setting=setting)

fig, ax = plt.subplots(figsize=(2.2, 2.2))
ax.imshow(item.image, interpolation="nearest")
ax.set(xticks=[], yticks=[], xlabel=f"shown: {item.answer}    usual: {item.prior_value}")
fig.tight_layout()
plt.show()
lines = "".join(
    f'<div style="margin:8px 0"><b>{method}</b><br><code style="white-space:pre-wrap">'
    f"&lt;description&gt;{colored(both[method][chosen])}</code></div>"
    for method in METHODS
)
display(HTML(
    '<div style="background:#fff;color:#111;padding:10px;line-height:1.8;max-width:60em">'
    f"<b>{html.escape(item.question)}</b>{lines}</div>"
))  # fmt: skip

# %% [markdown]
# The leak is planted in the demo's base, so that a small model shows what large ones do by themselves; README.md says
# how. For a model of your own: `--mode diagnose` takes any run, and `--config.diagnose.rollouts=FILE.jsonl` rollouts
# of any engine.
