"""Numbers of the authors' PyTorch code, and of plain PyTorch code after the paper, reproduced from arrays.

`released` is the authors' code, `paper` the text where the two differ (tests/fixtures/goldens/README.md). Both run
through the production path: packed branches, chunked heads, the train step's gradient.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import KEEP_GRADIENT

from configs import paper as paper_config
from configs import released_code
from vigos_jax.data.processor import EncodedImage, Turn
from vigos_jax.method import losses
from vigos_jax.method.packing import Buckets, pack_scores
from vigos_jax.method.roles import role_table
from vigos_jax.method.rows import Rollout, Row
from vigos_jax.method.scoring import score_batch
from vigos_jax.method.spans import Spans, find_spans
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.families import adapter_table
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.training.step import TrainState, make_train_step
from vigos_jax.weights import adapters, reading, writing

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "goldens"
TOLERANCE = 1e-4
# As small as the data allows. Students and teachers that score their own spans need 313 tokens, the released code's
# teachers of every position 407, the paper's 622.
BUCKETS = Buckets(patches=(256,), prompt=(247,), completion=(66,), sequence=(320, 416, 640))
VISION_END = 930


def read(name):
    return json.loads((FOLDER / name).read_text())


CASES = {case["case"]: case for case in read("cases.json")}
INPUTS = dict(np.load(FOLDER / "inputs.npz"))
EXPECTED = dict(np.load(FOLDER / "expected.npz"))
NAMES = tuple(CASES)
CONFIG = ModelConfig.load(FOLDER / "model")
SPEC = adapters.adapter_spec(FOLDER / "adapter", dropout=0.0)
MODEL = VisionLanguageModel(CONFIG, lora=SPEC)


@functools.cache
def weights():
    abstract = abstract_variables(MODEL)
    base = reading.load_params(FOLDER / "model", CONFIG, abstract["params"], dtype=jnp.float32)
    return base, {"lora": adapters.load_adapter(FOLDER / "adapter", CONFIG, SPEC, abstract["lora"])}


# What each reading is made of: the role table of its config, the turns as token ids, the spans of a completion.


def table(config):
    return role_table(config.roles, config.prompts)


PAPER, RELEASED = table(paper_config.get_config()), table(released_code.get_config())


def prompt(sample, role):
    return tuple(int(i) for i in INPUTS[f"sample{sample}/{role}"])


def description_prefill(sample):
    """Ids of `<description>`: what the student's prompt has and the perception role's, which has no prefill, lacks."""
    student, perception = prompt(sample, "student"), prompt(sample, "perception")
    same = next(n for n in range(1, 20) if student[-n - 3 : -n] == perception[-3:])
    return student[-same:]


def turn(ids):
    end = ids.index(VISION_END) + 1
    return Turn(ids[:end], ids[end:])


def released_turns(sample):
    return {role: prompt(sample, role) for role in ("perception", "reasoning", "reference")}


def paper_turns(sample):
    prefill, think = description_prefill(sample), think_prefill(sample)
    reasoning = prompt(sample, "reasoning")[: -len(think)] + prefill
    return {
        "perception": prompt(sample, "perception") + prefill,
        "reasoning": reasoning,
        "reference": prompt(sample, "reference"),
    }


def think_prefill(sample):
    """Ids of `<think>` at the end of the reasoning prompt: what stands behind the chat header."""
    header, ids = prompt(sample, "perception")[-3:], prompt(sample, "reasoning")
    return ids[next(i for i in range(len(ids) - 3, 0, -1) if ids[i : i + 3] == header) + 3 :]


def bytes_of(case):
    return [bytes.fromhex(x) for x in case["token_bytes"]]


def paper_spans(name):
    return find_spans(bytes_of(CASES[name]))


def stored_spans(name, parser="slow"):
    """The released code's own spans; those of non-canonical ids are shifted, which we do not reproduce."""
    i = NAMES.index(name)
    if not EXPECTED[f"released/{parser}/valid"][i]:
        return find_spans(bytes_of(CASES[name]), rule="released")
    description = np.flatnonzero(EXPECTED[f"released/{parser}/description_mask"][i])
    reasoning = EXPECTED[f"released/{parser}/reasoning_positions"][i]
    reasoning = reasoning[EXPECTED[f"released/{parser}/reasoning_mask"][i]]
    for part in (description, reasoning):
        assert np.array_equal(part, np.arange(part[0], part[-1] + 1))
    parts = [(int(p[0]), int(p[-1]) + 1) for p in (description, reasoning)]
    return Spans(True, *parts, (0, 0), None)


def released_spans(name):
    return stored_spans(name) if name == "valid_noncanonical" else find_spans(bytes_of(CASES[name]), rule="released")


def pack(names, roles, turns, spans):
    """The batch of these cases; rows of all other cases are bad, so that every batch has 12."""
    rows, rollouts = [], []
    for name in NAMES:
        if name not in names:
            rows.append(Row())
            rollouts.append(None)
            continue
        sample = CASES[name]["sample"]
        image = EncodedImage(INPUTS[f"sample{sample}/patches"], tuple(int(n) for n in INPUTS[f"sample{sample}/grid"]))
        of_role = turns(sample)
        teachers = tuple(turn(of_role[r.name]) for r in roles)
        rows.append(Row((image,), turn(prompt(sample, "student")), teachers))
        rollouts.append(Rollout(tuple(CASES[name]["ids"]), spans(name)))
    return pack_scores(rows, rollouts, roles=roles, config=CONFIG, buckets=BUCKETS)


@functools.cache
def scorer(roles, temperature):
    objective = losses.ObjectiveConfig(roles, 16, temperature)
    return jax.jit(functools.partial(score_batch, MODEL, objective=objective))


def unclipped(roles, **changes):
    """What the compiled programs need to know of a table: clips are in the entries, weights outside."""
    plain = {"clip": 0.0, "first_clip": 0.0, "last_clip": 0.0, "weight": 1.0} | changes
    return tuple(dataclasses.replace(r, **plain) for r in roles)


def score(batch, roles, temperature=1.0):
    base, trained = weights()
    return jax.device_get(scorer(unclipped(roles), temperature)(base, trained, batch))


def everywhere(roles):
    """The same contexts, scoring every position of every rollout."""
    return tuple(dataclasses.replace(r, scores=("completion",), when="always", clip=0.0) for r in roles)


def per_role(batch, scores, roles):
    """{(case, role): (positions, kl)}"""
    out = {}
    for i, name in enumerate(NAMES):
        for r, role in enumerate(roles):
            used = batch.supervised.role[i] == r
            out[name, role.name] = batch.supervised.position[i][used], scores.divergence[i][used]
    return out


# Model.


@pytest.mark.parametrize("who", ["student", "base"])
def test_vision_embeddings(who):
    base, trained = weights()
    batch = pack(NAMES, PAPER, paper_turns, paper_spans)
    variables = {"params": base} | (trained if who == "student" else {})
    embeds = jax.jit(functools.partial(MODEL.apply, method="encode_images"))(variables, batch.vision)
    for i, case in enumerate(CASES.values()):
        want = EXPECTED[f"image_embeds/sample{case['sample']}/{who}"]
        np.testing.assert_allclose(embeds[i, : len(want)], want, atol=TOLERANCE)


@functools.cache
def merged_case():
    """Logits of `valid_merged` at every completion position, by role, from the packed branches."""
    base, trained = weights()
    roles = tuple(
        r if r.reads == "scored" else dataclasses.replace(r, scores=("completion",), when="always") for r in RELEASED
    )
    batch = pack(("valid_merged",), roles, released_turns, released_spans)
    i = NAMES.index("valid_merged")

    @jax.jit
    def logits(variables, images_of, text):
        images = MODEL.apply(images_of, batch.vision, method="encode_images")
        hidden, _ = MODEL.apply(variables, text, images)
        return MODEL.apply(variables, hidden[i], method="logits")

    teacher, student = {"params": base}, {"params": base} | trained
    by_teacher, by_student = logits(teacher, teacher, batch.teacher), logits(student, teacher, batch.student)
    out = {}
    for r, role in enumerate(roles):
        used = batch.supervised.role[i] == r
        order = np.argsort(batch.supervised.position[i][used])
        out[f"{role.name}_teacher"] = by_teacher[batch.supervised.teacher_at[i][used][order]]
        if role.name == "reference":
            out["student"] = by_student[batch.supervised.student_at[i][used][order]]
    return out


@pytest.mark.parametrize("who", ["student", "perception_teacher", "reference_teacher", "reasoning_teacher"])
def test_logits(who):
    want = EXPECTED[f"released/logits/valid_merged/{who}"]
    np.testing.assert_allclose(merged_case()[who], want, atol=TOLERANCE)


# Divergences at every position.


@functools.cache
def everywhere_kl(reading):
    if reading == "paper":
        roles, turns = everywhere(PAPER), paper_turns
    else:
        roles, turns = everywhere(tuple(r for r in RELEASED if r.reads != "scored")), released_turns
    batch = pack(NAMES, roles, turns, paper_spans)
    return per_role(batch, score(batch, roles), roles)


@pytest.mark.parametrize("role", ["perception", "reasoning", "reference"])
def test_divergences_of_the_paper(role):
    stored = {"perception": "perception_with_description_prefill"}.get(role, role)
    scored = 0
    for name in NAMES:
        positions, kl = everywhere_kl("paper")[name, role]
        want = EXPECTED.get(f"paper/{name}/{stored}_kl_all_positions", np.zeros(0))  # one case has no token
        assert list(positions) == list(range(len(want)))
        np.testing.assert_allclose(kl, want, atol=TOLERANCE)
        scored += len(want)
    assert scored == sum(len(case["ids"]) for case in CASES.values())


@pytest.mark.slow
@pytest.mark.parametrize("role", ["perception", "reference"])
def test_divergences_of_the_released_code(role):
    stored = EXPECTED["released/slow/" + {"perception": "perception_kl", "reference": "ref_kl"}[role]]
    for i, name in enumerate(NAMES):
        positions, kl = everywhere_kl("released")[name, role]
        np.testing.assert_allclose(kl, stored[i, positions], atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("parser", ["slow", "fast"])
def test_divergences_of_the_released_reasoning_teacher(parser, temperature):
    batch = pack(NAMES, RELEASED, released_turns, functools.partial(stored_spans, parser=parser))
    found = per_role(batch, score(batch, RELEASED, temperature), RELEASED)
    suffix = "" if temperature == 1 else "_T2"
    total = 0
    for i, name in enumerate(NAMES):
        mask = EXPECTED[f"released/{parser}/reasoning_mask"][i]
        positions, kl = found[name, "reasoning"]
        assert list(positions) == list(EXPECTED[f"released/{parser}/reasoning_positions"][i][mask])
        np.testing.assert_allclose(kl, EXPECTED[f"released/{parser}/reasoning_kl{suffix}"][i][mask], atol=TOLERANCE)
        for role, key, of in (("perception", "perception_kl", "description_mask"), ("reference", "ref_kl", "ref_mask")):
            positions, kl = found[name, role]
            mask = EXPECTED[f"released/{parser}/{of}"][i]
            assert list(positions) == list(np.flatnonzero(mask))
            np.testing.assert_allclose(kl, EXPECTED[f"released/{parser}/{key}{suffix}"][i][mask], atol=TOLERANCE)
        total += len(positions)
    assert total > 100


# Spans.


@pytest.mark.parametrize("case", read("spans.json"), ids=lambda case: case["case"])
def test_released_spans(case):
    spans = find_spans(bytes_of(case), rule="released")
    assert spans.is_valid == case["valid"]
    assert (list(spans.description), list(spans.reasoning)) == (case["description"], case["reasoning"])


@pytest.mark.parametrize("name", [n for n in NAMES if n != "valid_noncanonical"])
def test_released_masks(name):
    assert find_spans(bytes_of(CASES[name]), rule="released") == stored_spans(name)


@pytest.mark.parametrize("name", NAMES)
def test_paper_spans(name):
    case, spans = CASES[name], paper_spans(name)
    assert spans.is_valid == case["valid"]
    if case["valid"]:
        segments = case["segments"]
        for part, stored in (("description",) * 2, ("reasoning",) * 2, ("answer", "answer_content")):
            assert list(range(*getattr(spans, part))) == segments[stored]


# Losses, for every stored batch and setting.


def with_settings(roles, hparams):
    """The role table under one of the released code's hyperparameter sets."""
    first = {"reasoning": hparams["reasoning_first_token_clip"] or 0.0}
    last = {"perception": hparams["description_last_token_clip"] or 0.0}
    weight = {"reference": hparams["lambda_ref"]} | {r: hparams[f"lambda_{r}"] for r in ("perception", "reasoning")}
    return tuple(
        dataclasses.replace(
            role,
            weight=weight[role.name],
            clip=hparams["token_loss_clip"] or 0.0,
            first_clip=first.get(role.name, 0.0),
            last_clip=last.get(role.name, 0.0),
        )
        for role in roles
    )


@functools.cache
def released_scores(parser, temperature):
    spans = released_spans if parser == "slow" else functools.partial(stored_spans, parser=parser)
    batch = pack(NAMES, RELEASED, released_turns, spans)
    return spans, score(batch, RELEASED, temperature)


def means(batch, scores, roles):
    objective = losses.ObjectiveConfig(roles, chunk=16)
    stats = losses.role_stats(scores, batch.supervised, objective)
    total = losses.total_loss(stats, stats.normalizer, objective)
    return float(total), np.array(losses.role_losses(stats, stats.normalizer)), stats.tokens


LOSSES = read("released_losses.json")


@pytest.mark.parametrize("stored", LOSSES, ids=[f"{x['parser']}-{x['batch']}-{x['hparams_name']}" for x in LOSSES])
def test_losses_of_the_released_code(stored):
    hparams = stored["hparams"]
    roles = with_settings(RELEASED, hparams)
    spans, scores = released_scores(stored["parser"], hparams["distill_temperature"])
    batch = pack(stored["cases"], roles, released_turns, spans)
    total, parts, tokens = means(batch, scores, roles)
    assert total == pytest.approx(stored["loss"], abs=TOLERANCE)
    # With weight 0 the released code does not look at the reference role at all.
    names = ("perception", "reasoning", "ref") if hparams["lambda_ref"] else ("perception", "reasoning")
    for r, name in enumerate(names):
        assert tokens[r] == stored[f"n_tokens_{name}"]
        assert parts[r] == pytest.approx(stored[f"loss_{name}"], abs=TOLERANCE)


def test_the_released_config_has_the_default_settings():
    default = next(x["hparams"] for x in LOSSES if x["hparams_name"] == "default")
    assert with_settings(RELEASED, default) == RELEASED


def boxed_spans(name):
    """The paper's spans with the whole box as the answer: what the stored totals score."""
    spans = paper_spans(name)
    if not spans.is_valid:
        return spans
    box = CASES[name]["segments"]["answer_box"]
    return dataclasses.replace(spans, answer=(box[0], box[-1] + 1))


def bare_perception_turns(sample):
    return paper_turns(sample) | {"perception": prompt(sample, "perception")}


def paper_roles(clip):
    return tuple(dataclasses.replace(r, clip=clip or 0.0) for r in PAPER)


@functools.cache
def paper_scores(boxed):
    turns, spans = (bare_perception_turns, boxed_spans) if boxed else (paper_turns, paper_spans)
    return turns, spans, score(pack(NAMES, PAPER, turns, spans), PAPER)


@pytest.mark.parametrize("stored", read("paper_losses.json"), ids=lambda x: f"{x['batch']}-{x['hparams_name']}")
def test_losses_of_the_paper(stored):
    roles = paper_roles(stored["token_clip"])
    turns, spans, scores = paper_scores(boxed=True)
    total, parts, tokens = means(pack(stored["cases"], roles, turns, spans), scores, roles)
    assert total == pytest.approx(stored["total_lambda_1_1_2_with_reasoning_plus_answer_box"], abs=TOLERANCE)
    boxed, counts = stored["loss_reasoning"], stored["n_tokens_reasoning"]
    want = (stored["loss_perception"], boxed["reasoning_plus_answer_box"], stored["loss_ref"])
    assert parts == pytest.approx(np.array(want), abs=TOLERANCE)
    assert list(tokens) == [
        stored["n_tokens_perception"], counts["reasoning_plus_answer_box"], stored["n_tokens_ref"]
    ]  # fmt: skip

    # configs/paper.py itself: the perception teacher's turn starts with `<description>`, the answer is inside the box.
    turns, spans, scores = paper_scores(boxed=False)
    _, parts, tokens = means(pack(stored["cases"], roles, turns, spans), scores, roles)
    assert parts[1] == pytest.approx(boxed["reasoning_plus_answer_content"], abs=TOLERANCE)
    assert tokens[1] == counts["reasoning_plus_answer_content"]
    valid = [name for name in stored["cases"] if CASES[name]["valid"]]
    kls = [EXPECTED[f"paper/{name}/perception_with_description_prefill_kl_all_positions"] for name in valid]
    scored = [kl[CASES[name]["segments"]["description"]] for kl, name in zip(kls, valid, strict=True)]
    clipped = np.minimum(np.concatenate(scored), stored["token_clip"] or np.inf)
    assert parts[0] == pytest.approx(clipped.mean(), abs=TOLERANCE)


def test_the_paper_config_has_the_paper_settings():
    assert paper_roles(0.05) == PAPER and [r.weight for r in PAPER] == [1, 1, 2]


# Gradients.


@functools.cache
def gradient_step(roles):
    step = make_train_step(MODEL, KEEP_GRADIENT, losses.ObjectiveConfig(roles, chunk=16), use_dropout=False)

    @jax.jit
    def run(base, trained, batch):
        state = TrainState(jnp.zeros((), jnp.int32), trained, KEEP_GRADIENT.init(trained), {})
        state, metrics = step(state, base, [batch], jax.random.key(0))
        return state.opt_state, metrics

    return run


def gradient(names, roles, turns, spans):
    """The gradient as PEFT names and lays it out."""
    base, trained = weights()
    batch = pack(names, roles, turns, spans)
    weight = {r.name: r.weight for r in roles}
    program = tuple(dataclasses.replace(r, weight=weight[r.name]) for r in unclipped(roles))
    grads, metrics = gradient_step(program)(base, trained, batch)
    return dict(writing.file_tensors(grads["lora"], adapter_table(CONFIG, SPEC), CONFIG, dtype=np.float32)), metrics


def check_gradient(got, prefix):
    stored = {k.removeprefix(prefix): v for k, v in EXPECTED.items() if k.startswith(prefix)}
    assert len(stored) == len(got) == 42
    largest = 0.0
    for name, value in got.items():
        module = name.removeprefix("base_model.model.model.").removesuffix(".weight")
        np.testing.assert_allclose(value, stored[module], atol=TOLERANCE)
        largest = max(largest, np.abs(stored[module]).max())
    assert largest > 0.1


CANONICAL = tuple(n for n in NAMES if n not in ("invalid_zero_tokens", "valid_noncanonical"))


@pytest.mark.slow
@pytest.mark.parametrize("hparams", ["default", "noclip"])
@pytest.mark.parametrize("batch, parser", [("all12", "slow"), ("canonical10", "slow"), ("canonical10", "fast")])
def test_gradients_of_the_released_code(batch, parser, hparams):
    stored = next(x for x in LOSSES if (x["batch"], x["parser"], x["hparams_name"]) == (batch, parser, hparams))
    spans = released_spans if parser == "slow" else functools.partial(stored_spans, parser=parser)
    got, metrics = gradient(stored["cases"], with_settings(RELEASED, stored["hparams"]), released_turns, spans)
    check_gradient(got, f"released/grads/{batch}/{parser}/{hparams}/")
    assert metrics["loss"] == pytest.approx(stored["loss"], abs=TOLERANCE)
    assert metrics["grad_norm"] == pytest.approx(stored["grad_norm"]["all"], abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("hparams, clip", [("default", 0.05), ("noclip", None)])
def test_gradients_of_the_paper(hparams, clip):
    got, _ = gradient(CANONICAL, paper_roles(clip), bare_perception_turns, boxed_spans)
    check_gradient(got, f"paper/grads/canonical10/{hparams}/")


# What must not pass: each difference between the two readings, taken back.


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"reads": "completion"},  # the reasoning teacher reads the description
        {"divergence": "reverse_kl"},
    ],
    ids=str,
)
def test_a_wrong_reasoning_role_shows(change):
    wrong = tuple(dataclasses.replace(r, **change) if r.name == "reasoning" else r for r in RELEASED)
    batch = pack(NAMES, wrong, released_turns, released_spans)
    found = per_role(batch, score(batch, wrong), wrong)
    stored, mask = EXPECTED["released/slow/reasoning_kl"], EXPECTED["released/slow/reasoning_mask"]
    assert np.abs(found["valid_merged", "reasoning"][1] - stored[1][mask[1]]).max() > 0.01


def test_a_missing_prefill_shows():
    roles = everywhere(PAPER)
    batch = pack(("valid_merged",), roles, bare_perception_turns, paper_spans)
    found = per_role(batch, score(batch, roles), roles)["valid_merged", "perception"][1]
    stored = EXPECTED["paper/valid_merged/perception_with_description_prefill_kl_all_positions"]
    assert np.abs(found - stored).max() > 0.5
    np.testing.assert_allclose(found, EXPECTED["paper/valid_merged/perception_kl_all_positions"], atol=TOLERANCE)


def test_a_dropped_adapter_shows():
    base, _ = weights()
    roles = everywhere(PAPER)
    batch = pack(("valid_merged",), roles, paper_turns, paper_spans)
    found = per_role(batch, scorer(unclipped(roles), 1.0)(base, {}, batch), roles)
    stored = EXPECTED["paper/valid_merged/reference_kl_all_positions"]
    assert np.abs(np.asarray(found["valid_merged", "reference"][1]) - stored).max() > 0.01
