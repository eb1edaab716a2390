"""The paper in miniature: its statistics against scipy's, its commands, going on, and what is said of its results."""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import stats

from configs.miniature import base as miniature_base
from configs.miniature import study as shipped
from vigos_jax import main as command_line
from vigos_jax.config import validate
from vigos_jax.data.processor import Processor
from vigos_jax.errors import InputError
from vigos_jax.miniature import make_base, plots, study, tables, units
from vigos_jax.miniature.assets import write_assets
from vigos_jax.miniature.jobs import Job, Jobs
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.vlm import VisionLanguageModel

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "docs" / "miniature"

# Statistics ---------------------------------------------------------------------------------------


def test_estimate_is_students():
    values = np.random.default_rng(0).normal(0.1, 0.2, 7)
    got, test = tables.estimate(list(values)), stats.ttest_1samp(values, 0.0)
    interval = test.confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert got.p == pytest.approx(test.pvalue, abs=1e-12)
    assert (got.n, got.above) == (7, int((values > 0).sum()))


@pytest.mark.parametrize("values", [[0.3], [0.2, 0.4]])
def test_of_few_seeds_there_is_no_interval(values):
    got = tables.estimate(values)
    assert got.mean == pytest.approx(0.3) and math.isnan(got.half) and math.isnan(got.p)
    assert tables.with_interval(got) == "0.300" and tables.with_test(got) == "+0.300"


def test_of_equal_numbers_the_interval_is_a_point():
    assert tables.estimate([0.25, 0.25, 0.25]).p == 0 and tables.estimate([0.0, 0.0, 0.0]).p == 1


def record(method: str, seed: int, *, world: str = "demo", strength: float = 0.7, **rates) -> dict:
    key = {"world": world, "leak_strength": strength, "seed": seed}
    return {**key, "method": method, **dict.fromkeys(tables.METRICS), **rates}


def made_up(rng, **shifts: float) -> list[dict]:
    """Records of five seeds whose level differs much from seed to seed; methods differ by `shifts` in every rate."""
    out = []
    for seed in range(5):
        level = rng.uniform(0.2, 0.8)
        for method, shift in shifts.items():
            rates = {m: level + shift + rng.normal(0, 0.005) for m in tables.METRICS}
            out.append(record(method, seed, **rates))
    return out


def test_a_difference_is_taken_within_seeds():
    records = made_up(np.random.default_rng(1), vigos=0.1, base=0.0)
    pairs = [[r["score"] for r in records if r["method"] == m] for m in ("vigos", "base")]
    got, test = tables.difference(records, 0.7, "vigos", "base", "score"), stats.ttest_rel(*pairs)
    assert got.p == pytest.approx(test.pvalue, rel=1e-9) and got.p < 1e-4
    assert stats.ttest_ind(*pairs).pvalue > 0.05  # what it would be without the pairs
    shuffled = [r | {"seed": (r["seed"] + 1) % 5} if r["method"] == "base" else r for r in records]
    assert tables.difference(shuffled, 0.7, "vigos", "base", "score").p > 0.05


def test_only_seeds_that_both_have_count():
    records = [record("vigos", 1, score=0.5), record("vigos", 2, score=0.9), record("base", 2, score=0.8)]
    got = tables.difference(records, 0.7, "vigos", "base", "score")
    assert got.n == 1 and got.mean == pytest.approx(0.1)
    assert tables.difference(records, 0.7, "vigos", "base", "prior") is None
    assert tables.difference(records, 0.0, "vigos", "base", "score") is None


def verdict(records: list[dict], text: str) -> str:
    return next(c.verdict for c in tables.claims(records) if text in c.text)


def test_of_few_seeds_or_none_there_is_no_verdict():
    two = [r for r in made_up(np.random.default_rng(2), vigos=0.1, base=0.0) if r["seed"] < 2]
    assert verdict(two, "raises its base's Score") == "too few seeds"
    assert verdict(two, "higher Score than free-form OPSD") == "not measured"
    table = tables.claims_table(tables.claims(two))
    assert "| paper | **too few seeds** | Score: ViGOS − base | +0.1" in table and "(> 0) | 2 |" in table
    assert "| **not measured** | Score: ViGOS − OPSD, free form | – (> 0) | 0 |" in table


@pytest.mark.parametrize("shift, expected", [(0.1, "shown"), (0.001, "undecided"), (-0.1, "contradicted")])
def test_verdicts(shift, expected):
    records = made_up(np.random.default_rng(2), vigos=shift, base=0.0, opsd_same_prompt=0.0)
    assert verdict(records, "raises its base's Score") == expected
    assert verdict(records, "higher Score than OPSD with the same prompt") == expected
    against = {"shown": "contradicted", "contradicted": "shown", "undecided": "undecided"}[expected]
    assert verdict(records, "lowers its base's leak") == against
    assert verdict(records, "PALR of reasoning and answer is lower") == against


@pytest.mark.parametrize("shift, expected", [(0.0, "shown"), (-0.02, "undecided"), (-0.06, "contradicted")])
def test_verdict_on_prior_has_a_margin(shift, expected):
    assert verdict(made_up(np.random.default_rng(3), vigos=shift, base=0.0), "base's Prior") == expected


@pytest.mark.parametrize(
    "faithful_gap, spread, closed, shrinks",
    [
        (0.0, 0.004, "shown", "shown"),
        (0.05, 0.004, "undecided", "shown"),
        (0.3, 0.004, "contradicted", "undecided"),
        (0.0, 0.1, "undecided", "shown"),
    ],
)
def test_verdict_on_the_gap(faithful_gap, spread, closed, shrinks):
    records = []
    for seed, noise in enumerate(np.linspace(-1, 1, 5)):
        for leak, gap in ((0.7, 0.3), (0.0, faithful_gap)):
            score = 0.5 + gap + spread * noise
            records += [record("vigos", seed, strength=leak, score=score)]
            records += [record("opsd_same_prompt", seed, strength=leak, score=0.5 + (leak > 0) * spread * noise / 2)]
    assert verdict(records, "are within 0.05 of Score") == closed
    assert verdict(records, "lead over OPSD is smaller") == shrinks


CLAIMED = {  # of each claim what it compares, and its bounds where they are not 0 and infinity
    "ViGOS raises its base's Score": "Score: ViGOS − base",
    "ViGOS loses less than 0.02 of its base's Prior": "Prior: ViGOS − base",
    "ViGOS has a higher Score than OPSD with the same prompt": "Score: ViGOS − OPSD, same prompt",
    "ViGOS has a higher Score than free-form OPSD": "Score: ViGOS − OPSD, free form",
    "PALR of reasoning and answer is lower under ViGOS": "PALR T_ra: OPSD, same prompt − ViGOS",
    "PALR of all tokens is lower under ViGOS": "PALR T_y: OPSD, same prompt − ViGOS",
    "without the perception role Score is lower": "Score: ViGOS − no perception role",
    "without the reasoning role Score is lower": "Score: ViGOS − no reasoning role",
    "without the reference role Score is lower": "Score: ViGOS − no reference role",
    "with forward KL in the reference role Score is lower": "Score: ViGOS − reference role, forward KL",
    "ViGOS lowers its base's leak": "leak: base − ViGOS",
    "ViGOS leaks less than OPSD with the same prompt": "leak: OPSD, same prompt − ViGOS",
    "ViGOS raises the share of valid rollouts": "valid: ViGOS − base",
    "without the reference role fewer rollouts are valid": "valid: ViGOS − no reference role",
    "ViGOS gains more over its base than free-form OPSD over its own": "Score: ViGOS − base − (OPSD − base)",
    "ViGOS's lead over OPSD is smaller where no leak was planted": "its Score − OPSD's, at 0.7 − at 0",
    "where no leak was planted, ViGOS and OPSD are within 0.05 of Score": "its Score − OPSD's, at 0",
    "the reasoning role teaches reasoning": "reasoned: ViGOS − no reasoning role",
    "the perception role teaches looking": "described: ViGOS − no perception role",
    "the clip costs Score at the demo's learning rate": "Score: ViGOS − clip",
    "the clip costs less than 0.05 of Score at the low rate": "Score: low rate, clip − low rate",
    "with clip and low rate ViGOS raises its base's Score": "Score: low rate, clip − base",
    "a perception teacher that sees another image leaves Score lower": "Score: ViGOS − perception sees another image",
    "a perception teacher that sees another image leaves fewer descriptions right": (
        "described: ViGOS − perception sees another image"
    ),
    "a reasoning teacher that sees another image leaves Score lower": "Score: ViGOS − reasoning sees another image",
    "weights by image dependence raise Score": "Score: tokens by image dependence − ViGOS",
}
BOUNDS = {"Prior: ViGOS − base": (-0.02, math.inf), "its Score − OPSD's, at 0": (-0.05, 0.05)}
BOUNDS |= {"Score: low rate, clip − low rate": (-0.05, math.inf)}


def test_claims_compare_what_they_say():
    """Each method has a level of its own in each metric, so that no other comparison gives the same number."""
    rng = np.random.default_rng(6)
    levels = {(m, metric): rng.uniform(0, 1) for m in tables.METHODS for metric in tables.METRICS}
    records = []
    for seed in range(5):
        for method in tables.METHODS:
            records.append(record(method, seed, **{metric: levels[method, metric] for metric in tables.METRICS}))
        records += [record(m, seed, strength=0.0, score=levels[m, "prior"]) for m in ("vigos", "opsd_same_prompt")]
    found = tables.claims(records)
    assert {c.text: c.measure for c in found} == CLAIMED
    methods = {title.strip("*"): m for m, title in tables.METHODS.items()}
    metrics = {title: m for m, title in tables.METRICS.items()}
    for c in found:
        assert c.bounds == BOUNDS.get(c.measure, (0.0, math.inf))
        metric, _, terms = c.measure.partition(": ")
        first, _, second = terms.partition(" − ")
        if second in methods:
            expected = levels[methods[first], metrics[metric]] - levels[methods[second], metrics[metric]]
            assert c.evidence.mean == pytest.approx(expected, abs=1e-12), c.text


def test_every_claim_shows_in_a_world_as_expected_and_in_its_mirror_none():
    """Levels of each method, in every rate at once; leak and PALR are better if lower."""
    better = {"base": 0, "vigos": 4, "opsd": -1, "base_free_form": -2, "opsd_same_prompt": 1}
    better |= dict.fromkeys(("no_perception", "no_reasoning", "no_reference"), 2)
    better |= {"reference_forward_kl": 3, "clipped": 3, "paper_rate": 1, "paper_rate_clipped": 1}
    better |= {"shuffled_perception": 2, "shuffled_reasoning": 2, "image_dependence": 5}
    assert set(better) == set(tables.METHODS)
    for mirror in (1, -1):
        levels = better if mirror > 0 else better | {"paper_rate_clipped": 3, "paper_rate": 1}
        records = []
        for seed in range(5):
            for method, level in levels.items():
                sign = {m: -1 if m == "leak" or m.startswith("palr") else 1 for m in tables.METRICS}
                rates = {m: 0.5 + mirror * s * 0.1 * level + 0.001 * seed for m, s in sign.items()}
                records.append(record(method, seed, **rates))
            for method in ("vigos", "opsd_same_prompt"):
                gap = 0.4 if method == "vigos" and mirror < 0 else 0.0  # it must close, and opens
                records.append(record(method, seed, strength=0.0, score=0.5 + gap + 0.001 * seed))
        found = {c.text: c.verdict for c in tables.claims(records)}
        assert len(found) == 26 and set(found.values()) == {"shown" if mirror > 0 else "contradicted"}, found


def test_the_claim_about_both_worlds():
    records = []
    for seed in range(4):
        for world, with_role in (("demo", 0.5), ("demo_reasoning", 0.8 + 0.01 * seed)):
            scores = {"vigos": with_role, "no_reasoning": 0.5}
            records += [record(m, seed, world=world, score=score) for m, score in scores.items()]
    assert [c.verdict for c in tables.claims_across(records)] == ["shown"]
    mirrored = [r | {"world": {"demo": "demo_reasoning"}.get(r["world"], "demo")} for r in records]
    assert [c.verdict for c in tables.claims_across(mirrored)] == ["contradicted"]
    assert [c.verdict for c in tables.claims_across([r for r in records if r["world"] == "demo"])] == ["not measured"]


def test_a_report_keeps_worlds_apart():
    records = [record("vigos", s, score=0.5) for s in range(3)]
    records += [record("vigos", s, world="demo_reasoning", score=0.9) for s in range(3)]
    first, second = tables.report(records).split("## Second world: reasoning: methods")
    assert "| **ViGOS** | 0.500 ± 0.000" in first and "| **ViGOS** | 0.900 ± 0.000" not in first
    assert "| **ViGOS** | 0.900 ± 0.000" in second


def test_what_bases_learned_of_the_leak():
    records = [
        record("base", s, strength=leak, leak=leak / 2) | {"follows_reference": leak / 4}
        for leak in (0.0, 0.7)
        for s in range(3)
    ]
    rows = tables.learned_table(records).splitlines()[2:]
    zero, leaky = "| 0 | 3 | 0.000 ± 0.000 | 0.000 ± 0.000 |", "| 0.7 | 3 | 0.175 ± 0.000 | 0.350 ± 0.000 |"
    assert rows == [zero, leaky]


def test_tables_hold_every_method_once_and_leave_gaps():
    records = made_up(np.random.default_rng(4), vigos=0.1, base=0.0, my_own=0.05)
    records += [record("opsd", s, score=0.4, prior=0.9) for s in range(5)]
    table = tables.methods_table(records).splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| OPSD, free form", "| base", "| **ViGOS**", "| my_own"]
    assert "0.400 ± 0.000 | 0.900 ± 0.000 | – | –" in table[2]
    assert "my_own" in tables.differences_table(records)


# Jobs ---------------------------------------------------------------------------------------------


def test_every_run_is_a_valid_command_line(tmp_path):
    config = shipped.get_config()
    jobs = study.all_jobs(units.units(config), config, tmp_path)
    assert len({job.name for job in jobs}) == len(jobs) == 2 * (11 + 5 * 13 + 5 * 12 + 12 + 12)
    bases = {str(job.done.parent) for job in jobs if job.arguments[0].endswith("make_base")}
    for job in jobs:
        if str(job.done.parent) in bases:
            continue
        config, mode, workdir = command_line._parse(list(job.arguments))
        validate(config)
        assert workdir in (job.done.parent, job.done.parent.parent) and (mode == "diagnose") == job.may_fail
        assert config.model.path in bases and config.model.path.endswith(f"-{config.seed}")
        assert f"base-{config.data.source}-" in config.model.path
        if mode == "train":
            assert config.demo_eval.seed == config.seed and config.demo_eval.questions == 500


def test_methods_are_what_their_names_say():
    def of(method: str):
        return command_line._parse(["vigos_jax.main", *shipped.METHODS[method], "--workdir=x"])[0]

    assert of("clipped").roles.reasoning.clip == of("paper_rate_clipped").roles.reference.clip == 0.05
    assert of("paper_rate").roles.perception.clip == 0
    assert of("paper_rate").optimizer.learning_rate == of("paper_rate_clipped").optimizer.learning_rate == 9.3e-5
    assert (
        of("shuffled_perception").roles.perception.image == of("shuffled_reasoning").roles.reasoning.image == "shuffled"
    )
    assert of("shuffled_reasoning").roles.perception.image == "original"
    assert of("image_dependence").roles.perception.token_weights == "image_dependence"
    assert set(shipped.METHODS) | {"base", "base_free_form"} == set(tables.METHODS)


def test_jobs_need_what_stands_before_them(tmp_path):
    config = shipped.get_config()
    jobs, before = study.all_jobs(units.units(config), config, tmp_path), set()
    for job in jobs:
        assert before.issuperset(job.needs)
        before.add(job.name)
    needs = {job.name: job.needs for job in jobs}
    assert needs["base-demo-0.0-302"] == needs["base-demo-0.35-302"] == ("base-demo-0.7-302",)  # share two stages
    assert needs["vigos-demo-0.0-302"] == ("base-demo-0.0-302",)
    assert needs["vigos-demo-0.0-302-palr"] == ("vigos-demo-0.0-302",)


def test_nothing_was_developed_on_these_seeds():
    seeds = {unit.seed for unit in units.units(shipped.get_config())}
    seen = {*range(101, 106), 201}  # of earlier studies
    assert not seeds & {0, 1, 2, 7, 42, *seen}  # of the shipped bases, their cards, first light and evaluations


def regroup(config, **fields) -> None:
    group = ConfigDict({**config.groups.half, **fields})
    del config.groups.half
    config.groups.half = group


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: c.groups.half.update({"leak": 0.0}), "demo, leak 0.0, seed 301, its base is there 2 times"),
        (lambda c: c.groups.leaky.update({"seeds": (7, 7)}), "seed 7, its base is there 2 times"),
        (lambda c: regroup(c, seeds=7), "config.groups.half.seeds=7: must be a tuple"),
        (lambda c: c.groups.leaky.update({"seeds": ("7",)}), r"leaky.seeds=\('7',\): must be a tuple of whole"),
        (lambda c: c.groups.half.update({"seeds": (-1,)}), r"half.seeds=\(-1,\): must be a tuple of whole numbers"),
        (lambda c: regroup(c, leak=7), "config.groups.half.leak=7: must be a number from 0 to 1"),
        (lambda c: regroup(c, leak="0.3"), "config.groups.half.leak='0.3': must be a number"),
        (lambda c: c.groups.leaky.update({"leak": 0.8}), "config.groups: one must have leak=0.7"),
        (lambda c: c.groups.half.__delitem__("methods"), "config.groups.half lacks methods; see"),
        (
            lambda c: regroup(c, methods="vigos"),
            "half.methods='vigos': must be a tuple of names; choices",
        ),
        (
            lambda c: c.methods.update({"mine": "configs/x.py"}),
            "config.methods.mine='configs/x.py': must be a tuple of",
        ),
        (lambda c: c.methods.update({"base": ("--config=x",)}), "config.methods.base: the name is taken; choose"),
        (lambda c: c.groups.leaky.update({"methods": ("vigo",)}), "groups.leaky.methods: 'vigo' is unknown; choices: "),
        (lambda c: c.worlds.update({"mine": "x.py"}), "config.worlds: 'mine' is unknown; choices: demo, "),
        (lambda c: c.update({"workers": 0}), "config.workers=0"),
        (lambda c: c.update({"palr_rows": 1}), "config.palr_rows=1: must be a whole number of at least 2"),
        (lambda c: c.update({"free_form": ("opds",)}), "config.free_form: 'opds' is unknown"),
    ],
)
def test_a_config_that_asks_for_the_impossible(change, said):
    config = shipped.get_config()
    change(config)
    with pytest.raises(InputError, match=said):
        units.check(config)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--config=configs/base.py"], "this config is not a study: it lacks free_form, groups"),
        (["--config=configs/nothing.py"], "nothing.py"),
        (["--config.question=3"], "Did you mean"),
        (["more"], "unexpected argument 'more'"),
    ],
)
def test_bad_command_lines(arguments, said, capsys, tmp_path):
    assert study.main(["study", f"--workdir={tmp_path}", *arguments]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1


def zip_job(folder: pathlib.Path, *, name: str = "a", source: str = "text") -> Job:
    """A job that any Python can do: packs a file."""
    (folder / "text").write_text("x")
    done = folder / f"{name}.zip"
    return Job(name, ("zipfile", "-c", str(done), str(folder / source)), done)


def slow_job(folder: pathlib.Path, *, name: str) -> Job:
    """Touches NAME.began and sleeps for a minute; never done."""
    code = f"import time, pathlib; pathlib.Path({str(folder / name)!r} + '.began').touch(); time.sleep(60)"
    return Job(name, ("timeit", "-n1", "-r1", code), folder / f"{name}.done")


def wait_for(path: pathlib.Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.05)


def run_jobs(jobs: list[Job], folder: pathlib.Path, *, workers: int = 2, **options) -> None:
    with Jobs(folder / "jobs", workers=workers) as runner:
        runner.run(jobs, **options)


def test_a_job_waits_for_those_it_needs(tmp_path):
    """The second worker has nothing to do but what stands last, while the first takes its time over a file."""
    made, packed = tmp_path / "made", tmp_path / "b.zip"
    code = f"import pathlib, time; time.sleep(2); pathlib.Path({str(made)!r}).touch()"
    first = Job("a", ("timeit", "-n1", "-r1", code), made)
    pack = Job(
        "b", ("zipfile", "-c", str(packed), str(made)), packed, needs=("a",)
    )  # packs nothing where there is none
    ended = []
    run_jobs([first, pack, zip_job(tmp_path, name="c")], tmp_path, on_end=lambda job: ended.append(job.name))
    assert sorted(ended) == ["a", "b", "c"] and ended.index("a") < ended.index("b")
    assert zipfile.ZipFile(packed).namelist() == ["made"]
    packed.unlink()
    run_jobs([first, pack], tmp_path)  # what it needs was done before
    assert packed.exists()


def test_a_job_that_may_fail_ends_nothing(tmp_path, capsys):
    failing = Job("b", ("zipfile", "--no-such"), tmp_path / "b.zip", may_fail=True)  # exits with 2
    run_jobs([failing, zip_job(tmp_path)], tmp_path, workers=1)
    assert (tmp_path / "a.zip").exists()
    assert "b  exit code 2; what it said is in " in capsys.readouterr().err


def test_it_may_be_refused_not_killed(tmp_path):
    """143 is how a command of this package ends that was asked to; 1 is a bug."""
    for code in (143, 1):
        job = Job("b", ("timeit", "-n1", "-r1", f"import os; os._exit({code})"), tmp_path / "b.zip", may_fail=True)
        with pytest.raises(InputError, match=f"b: exit code {code}"):
            run_jobs([job], tmp_path)


def test_a_job_that_needs_what_is_not_there_does_not_wait_for_ever(tmp_path):
    with pytest.raises(ValueError, match="a needs .*nothing.*: not all are in the list"):
        run_jobs([dataclasses.replace(zip_job(tmp_path), needs=("nothing",))], tmp_path)


def test_what_is_finished_is_not_done_again(tmp_path):
    jobs = [zip_job(tmp_path, name=name) for name in "abc"]
    run_jobs(jobs, tmp_path)
    assert all(job.done.exists() for job in jobs)
    jobs[1].done.unlink()
    before = jobs[0].done.stat().st_mtime_ns
    run_jobs(jobs, tmp_path)
    assert jobs[1].done.exists() and jobs[0].done.stat().st_mtime_ns == before


def test_a_result_without_its_record_is_not_believed(tmp_path):
    job = zip_job(tmp_path)
    job.done.write_text("of somebody else")
    run_jobs([job], tmp_path)
    assert job.done.read_bytes()[:2] == b"PK"


def test_nor_is_one_that_lay_there_when_its_job_was_stopped(tmp_path):
    job = Job("a", ("zipfile", "--help"), tmp_path / "a.zip")  # ends well and writes nothing, as a stopped run does
    job.done.write_text("of somebody else")
    for _ in range(2):
        with pytest.raises(InputError, match="it was stopped"):
            run_jobs([job], tmp_path)


def test_results_of_another_command_are_refused(tmp_path):
    run_jobs([zip_job(tmp_path)], tmp_path)
    (tmp_path / "other").write_text("y")
    with pytest.raises(InputError, match="was made with .*text.*, not .*other.*; choose another --workdir"):
        run_jobs([zip_job(tmp_path, source="other")], tmp_path)


def test_a_job_that_fails_ends_the_others_and_says_where_to_look(tmp_path):
    """The first runs for a minute, the second fails at once: the first is ended, the third is not begun."""
    failing = Job("b", ("zipfile", "-e", str(tmp_path / "none.zip"), str(tmp_path)), tmp_path / "b.zip")
    began = time.monotonic()
    with pytest.raises(InputError, match="b: exit code 1; what it said is in .*b.log; the same command resumes"):
        run_jobs([slow_job(tmp_path, name="a"), failing, *(zip_job(tmp_path, name=n) for n in "cdef")], tmp_path)
    assert time.monotonic() - began < 50
    assert "none.zip" in (tmp_path / "jobs" / "b.log").read_text()
    assert not list((tmp_path / "jobs").glob("[c-f].json"))


@pytest.mark.slow
def test_stopped_it_asks_its_jobs_to_end(tmp_path):
    """SIGTERM to the study while a job sleeps: the job is gone, the next never begins, exit code 130."""
    program = f"""
import signal, sys, pathlib
sys.path += [{str(ROOT / "tests" / "miniature")!r}, {str(ROOT / "tests")!r}]
from test_study import run_jobs, slow_job
from vigos_jax.runtime import shell
from vigos_jax.miniature import study
signal.signal(signal.SIGTERM, study._interrupt)
folder = pathlib.Path({str(tmp_path)!r})
jobs = [slow_job(folder, name=name) for name in ("one", "two")]
sys.exit(shell.run(lambda _: run_jobs(jobs, folder, workers=1), [], verbose=False))
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "one.began")
    with pytest.raises(InputError, match="jobs is in use by process .* is running"):
        run_jobs([], tmp_path)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=50)
    assert process.returncode == 130, said
    assert not (tmp_path / "two.began").exists()


@pytest.mark.slow
def test_a_job_that_outlives_its_study_keeps_the_folder(tmp_path):
    program = f"""
import sys, pathlib
sys.path += [{str(ROOT / "tests" / "miniature")!r}, {str(ROOT / "tests")!r}]
from test_study import run_jobs, slow_job
run_jobs([slow_job(pathlib.Path({str(tmp_path)!r}), name="one")], pathlib.Path({str(tmp_path)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "one.began")
    process.kill()
    process.wait()
    with pytest.raises(InputError, match="jobs is in use by process .* is running"):
        run_jobs([], tmp_path)
    subprocess.run(["pkill", "-f", str(tmp_path / "one")], check=True)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            return run_jobs([], tmp_path)
        except InputError:
            time.sleep(0.1)
    raise AssertionError("the folder stayed locked")


def summary(palr: float, tokens: int) -> dict:
    return {group: {"palr": palr, "tokens": tokens} for group in ("T_d", "T_ra", "T_y")}


def finish(unit: units.Unit, workdir: pathlib.Path) -> None:
    """Writes what the jobs of a unit would."""
    base = unit.folder(workdir)
    base.mkdir(parents=True)
    learned = {"reference": {"description_follows_reference": 0.4}}
    card = {"world": unit.world, "teachers_given_a_wrong_reference": learned}
    (base / "measured.json").write_text(json.dumps(card))
    (base / "README.md").write_text("")
    for i, method in enumerate(unit.methods):
        folder = unit.folder(workdir, method)
        (folder / "diagnose").mkdir(parents=True)
        rates = {
            "score": 0.1 * i,
            "prior": 0.5,
            "valid": 0.9,
            "leak": 0.3,
            "description_accuracy": 0.7,
            "reasoning": 0.8,
        }
        results = {"base": rates, "trained": rates | {"prior": 0.6}}
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "diagnose" / "summary.json").write_text(json.dumps(summary(0.25, 10)))
    (workdir / "jobs").mkdir()
    for job in study.all_jobs([unit], shipped.get_config(), workdir):
        made = {"arguments": job.arguments, "revision": f"of {job.name}"}
        (workdir / "jobs" / f"{job.name}.json").write_text(json.dumps(made))


def test_results_are_collected_from_the_runs(tmp_path):
    unit = units.Unit("demo", 0.7, 5, ("opsd", "opsd_same_prompt", "vigos"))
    finish(unit, tmp_path)
    found = {r["method"]: r for r in study.collect(unit, shipped.get_config(), tmp_path)}
    assert list(found) == ["base_free_form", "opsd", "base", "opsd_same_prompt", "vigos"]
    assert found["base"]["score"] == 0.1 and found["base"]["palr_ra"] is None and found["base"]["prior"] == 0.5
    assert found["base"]["follows_reference"] == 0.4
    assert found["base"]["revision"] == "of base-demo-0.7-5" == found["base_free_form"]["revision"]
    assert "follows_reference" not in found["base_free_form"]  # measured with the other prompt
    assert found["opsd"] == record("opsd", 5, score=0.0, prior=0.6) | {"revision": "of opsd-demo-0.7-5"}
    wanted = {"score": 0.2, "prior": 0.6, "valid": 0.9, "described": 0.7, "leak": 0.3, "reasoned": 0.8}
    wanted |= {"palr_d": 0.25, "palr_ra": 0.25, "palr_y": 0.25}
    assert found["vigos"] == record("vigos", 5, **wanted) | {"revision": "of vigos-demo-0.7-5"}
    (unit.folder(tmp_path, "vigos") / "diagnose" / "summary.json").unlink()  # PALR was refused
    found = study.collect(unit, shipped.get_config(), tmp_path)
    assert found[-1]["method"] == "vigos" and found[-1]["palr_y"] is None
    said = study.not_measured(found, shipped.get_config())
    assert said.endswith(" PALR could not be measured of vigos on demo at leak strength 0.7 with seed 5.")


def test_a_base_of_another_world_is_refused(tmp_path):
    unit = units.Unit("demo", 0.7, 5, ("vigos",))
    finish(unit, tmp_path)
    card = unit.folder(tmp_path) / "measured.json"
    card.write_text(card.read_text().replace('"demo"', '"demo_reasoning"'))
    with pytest.raises(InputError, match="config.worlds.demo=.*base.py makes bases of demo_reasoning; choose another"):
        study.collect(unit, shipped.get_config(), tmp_path)


def test_a_study_goes_on_from_known_results(tmp_path, monkeypatch):
    """Seed 5 is known, 6 is there but for its last job, of 7 all is to be done: they stand in the tables in turn."""
    config = shipped.get_config()
    config.worlds = {"demo": "configs/miniature/base.py"}
    config.groups = {"few": shipped.group(0.7, seeds=(5,), methods=("opsd_same_prompt", "vigos"))}
    (first,) = units.units(config)
    finish(first, tmp_path / "one")
    study.write(study.collect(first, config, tmp_path / "one"), config, tmp_path / "one")
    config.groups.few.seeds, config.known = (5, 6, 7), str(tmp_path / "one" / "results.json")
    _, second, third = units.units(config)
    workdir = tmp_path / "two"
    finish(second, workdir)
    last = study.all_jobs([second], config, workdir)[-1]
    last.done.unlink()
    ran = []

    def run(self, job: Job) -> str:
        if job.name.startswith("base"):
            assert [r["seed"] for r in json.loads((workdir / "results.json").read_text())["records"]] == [5] * 3 + [
                6
            ] * 3
            finish(third, tmp_path / "three")
            for folder in (tmp_path / "three").iterdir():
                shutil.copytree(folder, workdir / folder.name, dirs_exist_ok=True)
        ran.append(job.name)
        return "1 s"

    monkeypatch.setattr(Jobs, "_run", run)
    config.workers = 1
    study.run(config, workdir)
    assert ran == [last.name, *(job.name for job in study.all_jobs([third], config, workdir))]
    stored = json.loads((workdir / "results.json").read_text())
    assert [(r["seed"], r["method"]) for r in stored["records"]] == [
        (seed, method) for seed in (5, 6, 7) for method in ("base", "opsd_same_prompt", "vigos")
    ]


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda stored: stored["settings"].update(questions=9),
            "measured with config.questions=9, not 500; choose",
        ),
        (
            lambda stored: stored["settings"]["methods"].update(vigos=["--x"]),
            r"config.methods.vigos=\['--x'\], not",
        ),
        (lambda stored: stored["settings"]["worlds"].update(demo="x.py"), "has config.worlds.demo=x.py, not configs/"),
        (lambda stored: stored.pop("records"), "must be the results.json of a study, with settings and records"),
        (lambda stored: stored["records"][0].pop("seed"), "must be the results.json of a study"),
    ],
)
def test_known_results_of_another_study_are_refused(change, said, tmp_path):
    config = shipped.get_config()
    stored = {"settings": study.settings(config), "records": [record("vigos", 301)]}
    config.methods.mine, config.known = ("--config=mine.py",), str(tmp_path / "known.json")
    pathlib.Path(config.known).write_text(json.dumps(stored))
    assert study.read_known(config) == stored["records"]  # a method more does no harm
    change(stored)
    pathlib.Path(config.known).write_text(json.dumps(stored))
    with pytest.raises(InputError, match=said):
        study.read_known(config)


def test_a_report_says_which_bases_are_missing():
    config = shipped.get_config()
    key = {"world": "demo", "leak_strength": 0.35}
    some = [{**key, "seed": seed, "method": "base"} for seed in (301, 303)]
    said = study.not_measured(some, config)
    assert "; demo at leak strength 0.35: 302; " in said
    assert "; demo_reasoning at leak strength 0.35: 301, 302, 303; " in said
    assert said.endswith(" demo_reasoning at leak strength 0: 301, 302, 303.")
    every = [u.key | {"method": "base"} for u in units.units(config)]
    assert study.not_measured(every, config) == ""


def test_what_was_not_measured_is_no_zero():
    measured = {"score": 0.5, "prior": 0.5, "valid": 0.0, "leak": None, "description_accuracy": None, "reasoning": None}
    got = tables.rates(measured, summary(0.0, 0), free_form=False)
    assert got["valid"] == 0 and got["leak"] is None and got["palr_ra"] is None


# Bases and figures --------------------------------------------------------------------------------


def test_free_form_rows_have_both_prompts_and_no_description(tmp_path):
    config = miniature_base.get_config()
    texts = [text for p in config.prompts.values() for text in (p.user, p.assistant_prefill)]
    write_assets(tmp_path, world=config.world, templates=texts)
    processor = Processor.load(tmp_path)
    rows = make_base.RowMaker(processor, config, [1, 2])
    prompts, sure = set(), 0
    for _ in range(200):
        item, turn, response = rows.free_form()
        prompt = processor.decode([*turn.prefix_ids, *turn.rest_ids])
        assert "escri" not in prompt and "<" not in response and response.endswith("}")
        value = response.split("\\boxed{")[1][:-1]
        assert response == f"the {item.asks.kind} are {value} \\boxed{{{value}}}"
        prompts.add("Reference answer" in prompt)
        sure += value == item.answer
    assert prompts == {True, False} and 60 < sure < 190


def few_steps(tmp_path: pathlib.Path) -> tuple:
    """(config of a base trained for two steps a stage, its processor, its model)."""
    config = miniature_base.get_config()
    for stage in (config.vision, config.captions, config.responses):
        stage.steps, stage.batch_size = 2, 4
    config.responses.batch_size, config.warmup = 16, 1
    texts = [text for p in config.prompts.values() for text in (p.user, p.assistant_prefill)]
    write_assets(tmp_path, world=config.world, templates=texts)
    model = VisionLanguageModel(ModelConfig.load(tmp_path))
    return config, Processor.load(tmp_path), model


@pytest.mark.slow
def test_bases_that_differ_in_the_leak_share_what_comes_before(tmp_path, capsys):
    config, processor, model = few_steps(tmp_path / "base")
    config.captions_file = str(tmp_path / "captions.npz")
    made = make_base.train(config, processor, model)
    assert "2/3 captions" in capsys.readouterr().err
    shared = make_base.train(config, processor, model)
    assert "captions" not in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, shared, made)
    config.leak = 0.0
    kept = make_base._kept(lambda: pytest.fail("they were there"), config)
    assert jax.tree.structure(kept) == jax.tree.structure(made)
    config.seed, config.captions.steps = 9, 3
    with pytest.raises(InputError, match=r"captions.npz was made with other captions, seed; give another"):
        make_base._kept(lambda: None, config)


def test_the_shipped_base_has_no_free_form_rows():
    from configs import demo_base

    config = demo_base.get_config()
    assert config.responses.free_form_share == 0 and "free_form" not in config.prompts


def test_figures_are_the_same_bytes_for_the_same_numbers(tmp_path):
    records = made_up(np.random.default_rng(5), **dict.fromkeys(tables.METHODS, 0.1))
    for name in "ab":
        (tmp_path / name).mkdir()
        plots.draw(records, tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["demo_leak.svg", "demo_methods.svg", "demo_palr.svg"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "a" / "demo_methods.svg").read_text().count("OPSD, same prompt") == 1


# The whole of it ----------------------------------------------------------------------------------

TINY_BASE = """
from configs.miniature import base

def get_config():
    config = base.get_config()
    for stage in (config.vision, config.captions, config.responses):
        stage.steps, stage.batch_size = 3, 8
    config.responses.batch_size, config.warmup, config.card_items = 56, 1, 16
    return config
"""
TINY_STUDY = """
from configs.miniature import study

def get_config():
    config = study.get_config()
    config.worlds = {{"demo": "{folder}/tiny_base.py"}}
    config.methods.quick = ("--config={folder}/quick.py",)
    config.methods.quick_opsd = ("--config={folder}/quick_opsd.py",)
    config.free_form = ("quick", "quick_opsd")  # three steps of training make no valid rollout
    for name in ("half", "faithful"):
        del config.groups[name]
    config.groups.leaky = study.group(0.7, seeds=(1, 2), methods=("quick", "quick_opsd"))
    config.questions, config.palr_rows = 8, 8
    return config
"""
QUICK = """
from configs import {name} as full

def get_config():
    config = full.get_config()
    config.steps, config.batch_size, config.demo_eval.batch_size = 2, 8, 16
    return config
"""


@pytest.mark.stress
def test_a_study_of_minutes_end_to_end(tmp_path):
    (tmp_path / "tiny_base.py").write_text(TINY_BASE)
    (tmp_path / "study.py").write_text(TINY_STUDY.format(folder=tmp_path))
    (tmp_path / "quick.py").write_text(QUICK.format(name="base"))
    (tmp_path / "quick_opsd.py").write_text(QUICK.format(name="opsd"))
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vigos_jax.miniature.study", "--config", str(tmp_path / "study.py")]
    command += ["--workdir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "out" / "results.json").read_text())["records"]
    wanted = [(seed, method) for seed in (1, 2) for method in ("base_free_form", "quick", "quick_opsd")]
    assert sorted((r["seed"], r["method"]) for r in records) == wanted
    assert done.stdout.strip() == (tmp_path / "out" / "report.md").read_text().strip()
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout == done.stdout and "1/" not in again.stderr


# What was committed -------------------------------------------------------------------------------


def committed() -> list[dict]:
    return json.loads((COMMITTED / "results.json").read_text(encoding="utf-8"))["records"]


def lacking() -> str:
    return study.not_measured(committed(), shipped.get_config())


def test_the_committed_results_are_those_of_the_shipped_study():
    stored = json.loads((COMMITTED / "results.json").read_text(encoding="utf-8"))
    assert stored["records"] and stored["settings"] == study.settings(shipped.get_config())
    for unit in units.units(shipped.get_config()):
        methods = {r["method"] for r in stored["records"] if unit.key.items() <= r.items()}
        assert not methods or methods - {"base", "base_free_form"} == set(unit.methods)  # a base is done as a whole
    assert all(r["revision"] and not r["revision"].endswith("-dirty") for r in stored["records"])


def test_the_page_and_the_readme_show_the_committed_tables():
    page = (ROOT / "docs" / "miniature.md").read_text(encoding="utf-8")
    assert lacking() in page
    readme = ["| | base | OPSD, same prompt | **ViGOS** |", "|---|---|---|---|"]
    at = 0
    for world, found in tables.worlds(committed()).items():
        for table in (
            tables.methods_table(found),
            tables.differences_table(found),
            tables.learned_table(found),
            *(tables.leak_table(found, metric) for metric in tables.LEAK_METRICS),
            tables.claims_table(tables.claims(found)),
        ):
            assert (at := page.find(f"\n{table}\n", at)) > 0, f"{world}: {table[:60]}"
        scores = [tables.by_seed(found, tables.LEAKY, m, "score") for m in ("base", "opsd_same_prompt", "vigos")]
        base, opsd, vigos = (tables.with_interval(tables.estimate(list(s.values()))) for s in scores)
        readme.append(f"| {tables.WORLD_TITLES[world].lower()} | {base} | {opsd} | **{vigos}** |")
    assert f"\n{tables.claims_table(tables.claims_across(committed()))}\n" in page[at:]
    if not lacking():
        assert "Not measured yet" not in page and "earlier.json" not in page
        assert "\n".join(readme) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_committed_figures_are_drawn_from_the_committed_results(tmp_path):
    plots.draw(committed(), tmp_path)
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    earlier = {"methods.svg", "palr.svg", "leak.svg"} if lacking() else set()  # on the page until all bases are there
    assert drawn == {p.name: p.read_bytes() for p in COMMITTED.glob("*.svg") if p.name not in earlier}
