"""Every benchmark on small files of its published schema: what is asked, what is right, how it is summed up."""

import dataclasses
import json
import pathlib

import datasets
import numpy as np
import pytest
from task_files import image, make_all, write_table

from configs import base
from vigos_jax.data import images as images_lib
from vigos_jax.data.references import with_options
from vigos_jax.errors import InputError
from vigos_jax.evaluation import tasks as tasks_package
from vigos_jax.evaluation.questions import open_rows, questions_of
from vigos_jax.evaluation.statistics import Answer, interval, summarise, why_nothing
from vigos_jax.evaluation.tasks import TASKS, find_task
from vigos_jax.evaluation.tasks.mm_vet import grade_open
from vigos_jax.evaluation.tasks.task import Graded, Question, images_of, options_of, plain_text

OPTIONS = {"demo_questions": 3, "seed": 0}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(root / "cache")
    yield make_all(root)
    datasets.config.HF_DATASETS_CACHE = before


def questions(sources, name, limit=0):
    return questions_of(TASKS[name], open_rows(TASKS[name], sources.get(name, ""), **OPTIONS), limit=limit)


def test_the_config_names_every_task():
    assert set(base.get_config().eval.sources.keys()) == set(TASKS)
    with pytest.raises(InputError, match="'mmvet' is unknown; choices: cv_bench, demo"):
        find_task("mmvet")


PUBLISHED = {
    "mm_vet": ("zli12321/mm-vet", "test", 218),
    "mmmu": ("zli12321/MMMU", "test", 900),
    "mmmu_pro": ("zli12321/mmmu_pro_10options", "test", None),
    "mmmu_pro_vision": ("zli12321/mmmu-pro-vision", "test", None),
    "mathverse": ("zli12321/mathverse", "test", 3940),
    "mathvista": ("zli12321/mathvista", "test", 1000),
    "mmsi": ("zli12321/MMSI", "test", 1000),
    "realworldqa": ("zli12321/realWorldQA", "test", 765),
    "cv_bench": ("nyu-visionx/CV-Bench", "test", 2638),
    "vilp_f": ("ViLP/ViLP", "train", 300),  # of three questions each: 900
    "vilp_p": ("ViLP/ViLP", "train", 300),
    "vlind": ("klee972/VLind-Bench", "data.json", None),
    "demo": ("demo", "test", None),
    "demo_reasoning": ("demo_reasoning", "test", None),
}


def test_where_the_benchmarks_are_and_how_large():
    assert {name: (t.source, t.split, t.rows) for name, t in TASKS.items()} == PUBLISHED
    assert [name for name, t in TASKS.items() if t.samples == 1] == ["vilp_f", "vilp_p", "vlind"]


def test_a_task_is_one_file(tmp_path, monkeypatch):
    """A file beside the others is found by the name of its task."""
    (tmp_path / "own.py").write_text(
        "from vigos_jax.evaluation.tasks.task import ANSWER, IMAGES, QUESTION, Task, ask_one\n"
        "TASK = Task('own', 'Own', 'me/own', 'test', None, (QUESTION, ANSWER, IMAGES), ask_one)\n"
    )
    monkeypatch.setattr(tasks_package, "__path__", [*tasks_package.__path__, str(tmp_path)])
    found = {task.name: task for task in tasks_package._found()}
    assert set(found) == {*TASKS, "own"} and found["own"].title == "Own"


@pytest.mark.parametrize("name", TASKS)
def test_every_question_can_be_asked(sources, name):
    asked = questions(sources, name)
    assert asked and len({q.id for q in asked}) == len(asked)
    rows = open_rows(TASKS[name], sources.get(name, ""), **OPTIONS)
    for q in asked:
        assert q.error is None and q.text and q.reference and q.images
        assert "<image" not in q.text
        for item in q.images:
            assert images_lib.image_bytes(item, image_roots=rows.image_roots)
            assert images_lib.read_image(item, image_roots=rows.image_roots).size[0] > 27
        assert TASKS[name].grade(q, q.reference.split("<OR>")[0].replace("<AND>", " and "), None).is_correct
        assert not TASKS[name].grade(q, "no such thing", None).is_correct
        assert not TASKS[name].grade(q, None, None).is_correct


def test_what_is_asked(sources):
    first, second = questions(sources, "mmmu")
    assert first.text == "Compare image 1 and image 2.\nA. left\nB. right\nC. both" and len(first.images) == 2
    assert (second.text, second.options, second.group) == ("Solve.", (), "Math")
    assert len(questions(sources, "mmmu_pro")[0].options) == 10
    vision = questions(sources, "mmmu_pro_vision")[0]
    assert "a b" not in vision.text and vision.options == ("a b", "c d")
    assert len(questions(sources, "mmsi")[0].images) == 3 and questions(sources, "mmsi")[0].id == "3"
    length, which = questions(sources, "mathvista")
    assert (length.id, length.precision, which.options) == ("7", 1, ("no", "yes")) and which.precision is None
    assert TASKS["mathvista"].grade(length, "1.24", None).is_correct
    assert TASKS["mathvista"].grade(which, "B", None).is_correct
    assert [q.row for q in questions(sources, "mathverse", limit=2)] == [0, 2]  # spread over the source
    assert [q.group for q in questions(sources, "mathverse", limit=9)] == ["V0", "V1"] * 2
    assert [q.part for q in questions(sources, "demo", limit=2)] == ["conflict", "prior"]


def test_vilp_drops_the_fact_where_it_must(sources):
    full, partial = questions(sources, "vilp_f"), questions(sources, "vilp_p")
    assert {q.text for q in full} == {"Apples are red. What colour is it?"}
    assert {q.text for q in partial} == {"What colour is it?"}
    assert [q.reference for q in full] == ["red", "blue", "green"] * 2 and len(
        {q.images[0]["bytes"] for q in full}
    ) == 6


def verdicts(asked, right):
    """One sample of each, right where `right` says so."""
    return [Graded(q, 0, right(q)) for q in asked]


def test_vilp_score_and_prior(sources):
    asked = questions(sources, "vilp_f")
    numbers = TASKS["vilp_f"].summarise(
        verdicts(asked, lambda q: q.part == "image1" or (q.row, q.part) == (0, "image2"))
    )
    assert numbers == {"score": 25.0, "prior": 100.0, "image1": 100.0, "image2": 50.0, "image3": 0.0}


def test_cv_bench_averages_sources(sources):
    asked = questions(sources, "cv_bench")
    numbers = TASKS["cv_bench"].summarise(verdicts(asked, lambda q: q.id in ("0", "1", "3")))
    assert numbers == {"micro": 60.0, "2d": 50.0, "3d": 50.0, "official": 50.0}
    # A subset without a source has no official number.
    assert TASKS["cv_bench"].summarise(verdicts(asked[:2], lambda q: True)) == {"micro": 100.0}


def test_vlind_counts_a_stage_where_those_before_it_passed(sources):
    asked = questions(sources, "vlind")
    assert {q.row for q in asked} == {0}  # nobody found the second instance's pictures good
    assert [q.part for q in asked] == ["a", "a", "b", "b", "c", "c", "d0", "d0", "d4", "d4"]
    assert [q.reference for q in asked] == ["True", "False"] * 5
    assert "The sky is blue." in asked[0].text and "The sky is green." in asked[6].text
    assert asked[0].images[0].startswith("images/factual/") and asked[6].images[0].endswith("/0.jpg")
    summary = TASKS["vlind"].summarise
    assert summary(verdicts(asked, lambda q: True)) == dict.fromkeys(
        ("a", "b", "c", "d", "c_ungated", "d_ungated"), 100.0
    )
    half = summary(verdicts(asked, lambda q: q.part != "d4"))
    assert (half["c"], half["d"], half["d_ungated"]) == (100.0, 50.0, 50.0)
    # A model that always says True passes nothing.
    always_true = summary(verdicts(asked, lambda q: q.reference == "True"))
    assert always_true == {"a": 0, "b": 0, "c": None, "d": None, "c_ungated": 0, "d_ungated": 0}
    blind = summary(verdicts(asked, lambda q: q.part != "a"))
    assert (blind["a"], blind["b"], blind["c"], blind["d"], blind["c_ungated"]) == (0.0, 100.0, None, None, 100.0)


def test_vlind_leaves_out_what_is_incomplete(sources):
    graded = verdicts(questions(sources, "vlind"), lambda q: True)
    assert TASKS["vlind"].summarise(graded[2:])["d"] is None
    assert TASKS["vlind"].summarise([*graded[1:], Graded(graded[0].question, 0, None)])["a"] is None


@pytest.mark.parametrize(
    "answer, right",
    [("-1", True), ("minus one", True), ("it is minus one", True), ("1", False), ("minus", False), (None, False)],
)
def test_mm_vet_alternatives(sources, answer, right):
    assert grade_open(questions(sources, "mm_vet")[0], answer, None).is_correct == right


def test_mm_vet_needs_every_part(sources):
    question = questions(sources, "mm_vet")[1]
    assert grade_open(question, "there is a dog and a cat", None).is_correct
    assert not grade_open(question, "there is a cat", None).is_correct


@pytest.mark.parametrize(
    "reference, answer, right",
    [
        ("5", "there are 5 of them", True),
        ("5", "5 or 6", False),
        ("5", "there are 5, no, 6 of them", False),
        ("cat", "I see a black cat there", True),
        ("cat", "a cat or a dog", False),
        ("cat", "this is not a cat", False),
        ("yes", "Yes, it is", True),
        ("yes", "is it yes? no", False),
    ],
)
def test_mm_vet_needs_one_meaning(reference, answer, right):
    assert grade_open(Question("0", (), "Q?", reference), answer, None).is_correct is right


# -- rows ---------------------------------------------------------------------------------------------------------


def test_a_source_without_the_columns(tmp_path):
    folder = write_table(
        tmp_path, "test", [{"prompt": "x", "answer": "y", "picture": image(1)}], picture=datasets.Image()
    )
    with pytest.raises(InputError, match="lacks problem or question, images or image or image_1; it has .*picture"):
        open_rows(TASKS["mmmu"], str(folder), **OPTIONS)
    with pytest.raises(InputError, match="lacks question, image1"):
        open_rows(TASKS["vilp_f"], str(write_table(tmp_path / "b", "train", [{"answer": "y"}])), **OPTIONS)


@pytest.mark.parametrize(
    "task, source, words",
    [
        ("mmmu", "nowhere/at/all", "does not exist"),
        ("vlind", "nowhere/at/all", "not a folder with data.json"),
    ],
)
def test_a_source_that_is_not_there(task, source, words):
    with pytest.raises(InputError, match=words):
        open_rows(TASKS[task], source, **OPTIONS)


def test_an_unknown_split(tmp_path):
    folder = write_table(
        tmp_path, "validation", [{"question": "x", "answer": "y", "image": image(1)}], image=datasets.Image()
    )
    with pytest.raises(InputError, match="has no split 'test'; its files are validation"):
        open_rows(TASKS["mmmu"], str(folder), **OPTIONS)


@pytest.mark.parametrize("text", ["[", "{}", json.dumps([1]), "[]"])
def test_a_broken_data_json(tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(InputError, match="data.json"):
        open_rows(TASKS["vlind"], str(tmp_path), **OPTIONS)


@pytest.mark.parametrize(
    "row, images",
    [
        ({"images": ["a", None, "b"]}, ("a", None, "b")),  # cannot be read, and so is an error
        ({"images": "a"}, ("a",)),
        ({"image": {"bytes": b"x"}}, ({"bytes": b"x"},)),
        ({"image_2": "b", "image_10": "c", "image_1": "a", "image_3": None}, ("a", "b", "c")),
        ({"images": None, "image1": "a"}, ("a",)),
        ({"images": []}, ()),
    ],
)
def test_images_of_a_row(row, images):
    assert images_of(row) == images


def test_options_of_a_row():
    """Their forms: tests/grading/test_options.py."""
    assert options_of({"options": "['a', \"it's\"]"}) == ("a", "it's") and options_of({"choices": {"A": "a"}}) == ("a",)
    assert options_of({"options": ["<image 2>", "x"]}) == ("image 2", "x")
    assert options_of({}) == () and options_of({"options": "red or blue"}) is None


@pytest.mark.parametrize(
    "options",
    ['{"A": "red", "B": "blue"}', '["red","blue",null]', "A. red\nB. blue", ["A. red", "B. blue"]],
)
def test_options_are_shown_behind_their_letters(options):
    row = {"question": "Q?", "answer": "B", "image": image(1), "options": options}
    (question,) = TASKS["mmmu"].ask(row, 0)
    assert (question.text, question.options, question.error) == ("Q?\nA. red\nB. blue", ("red", "blue"), None)
    assert TASKS["mmmu"].grade(question, "blue", None).is_correct
    assert not TASKS["mmmu"].grade(question, "red", None).is_correct


@pytest.mark.parametrize(
    "answer, options, reference, is_index, error",
    [
        (1, ["red", "blue"], "B", True, None),  # counted from 0
        ("1", ["red", "blue"], "B", True, None),
        (0, ["red", "blue"], "A", True, None),
        (2, ["red", "blue"], "2", True, "answer_not_an_option"),
        ("1", ["1", "2"], "1", False, None),  # a text comes first
        (1, ["1", "2"], "1", True, "unclear_answer_index"),  # a number may be one option's text, another one's place
        (2, ["two", "three"], "2", False, None),
        ("b", ["red", "blue"], "b", False, None),
        ("B. blue", ["red", "blue"], "B. blue", False, None),
        ("blue", ["red", "blue"], "blue", False, None),
        ("AB", ["red", "blue", "green"], "AB", False, None),  # several together
        ("both", ["both", "both"], "both", False, None),
        ("pink", ["red", "blue"], "pink", False, "answer_not_an_option"),
        ("C", ["red", "blue"], "C", False, "answer_not_an_option"),
        (["B"], ["red", "blue"], "B", False, None),
        (["B", "blue"], ["red", "blue"], "B", False, None),
        (["A", "B"], ["red", "blue"], "A", False, "several_options_right"),
        ("B", "red or blue", "B", False, "bad_options"),
        (1, [], "1", False, None),
        (1, {"1": "red", "2": "blue"}, "A", True, None),  # the label, and not the second
        ("2", {"label": ["1", "2"], "text": ["red", "blue"]}, "B", True, None),
        ("2", [{"label": "1", "text": "red"}, {"label": "2", "text": "blue"}], "B", True, None),
        (0, {"1": "red", "2": "blue"}, "0", True, "answer_not_an_option"),
        ("1", {"0": "red", "1": "blue"}, "B", True, None),
    ],
)
def test_the_answer_of_a_row_with_options(answer, options, reference, is_index, error):
    row = {"question": "Q?", "answer": answer, "image": image(1), "options": options}
    (question,) = TASKS["mmmu"].ask(row, 0)
    assert (question.reference, question.is_index, question.error) == (reference, is_index, error)
    if error is None and reference in ("A", "B", "b", "blue"):
        assert TASKS["mmmu"].grade(question, reference[0].upper(), None).is_correct
        assert not TASKS["mmmu"].grade(question, "B" if reference == "A" else "A", None).is_correct


def test_a_source_that_counts_its_options_from_1_is_not_trusted(tmp_path):
    def errors(answers):
        folder = tmp_path / "-".join(map(str, answers))
        rows = [{"question": "Q?", "answer": a, "options": ["x", "y"], "image": image(1)} for a in answers]
        write_table(folder, "test", rows, image=datasets.Image(), options=datasets.List(datasets.Value("string")))
        return [q.error for q in questions_of(TASKS["mmmu"], open_rows(TASKS["mmmu"], str(folder), **OPTIONS), limit=0)]

    assert errors([0, 1]) == [None, None]
    assert errors([1, 2]) == ["unclear_answer_index", "answer_not_an_option"]


@pytest.mark.parametrize("answer", [["5", "five"], '["5", "five"]', "['5', 'five']"])
def test_any_of_several_references_is_right(answer):
    (question,) = TASKS["mmmu"].ask({"question": "Q?", "answer": answer, "image": image(1)}, 0)
    assert (question.reference, question.alternatives, question.accepted) == ("5", ("five",), "5 or five")
    assert (
        TASKS["mmmu"].grade(question, "5.0", None).is_correct and TASKS["mmmu"].grade(question, "Five", None).is_correct
    )
    assert not TASKS["mmmu"].grade(question, "6", None).is_correct
    (interval_question,) = TASKS["mmmu"].ask({"question": "Q?", "answer": "[2, 5]", "image": image(1)}, 0)
    assert interval_question.alternatives == ()


def test_texts():
    assert plain_text("<image>\nWhat <image 2> shows, <image_3>?") == "What image 2 shows, image 3?"
    assert with_options("Q?\nA. x\nB. y", ["x", "y"]) == "Q?\nA. x\nB. y"
    assert with_options("Q?", ["x", "y"]) == "Q?\nA. x\nB. y"
    assert with_options("(A) x (B) y?", ["x", "y"]) == "(A) x (B) y?"
    # The texts of the options stand in the question, but not as options.
    assert with_options("Of 12 cats, how many?", ["1", "2"]) == "Of 12 cats, how many?\nA. 1\nB. 2"
    assert with_options("Q?", ["(.*"]) == "Q?\nA. (.*" and with_options("Q?", []) == "Q?"
    assert plain_text(None) == plain_text(["x"]) == plain_text(float("nan")) == ""


@pytest.mark.parametrize(
    "change, error",
    [
        ({"question": " <image> "}, "empty_problem"),
        ({"question": ["Q?"]}, "empty_problem"),
        ({"answer": None}, "empty_answer"),
        ({"answer": float("nan")}, "empty_answer"),
        ({"answer": ["1", ["2"]]}, "empty_answer"),
        ({"image": None}, "no_image"),
        ({"options": [str(i) for i in range(27)]}, "too_many_options"),
    ],
)
def test_a_row_that_cannot_be_asked(change, error):
    (question,) = TASKS["mmmu"].ask({"question": "Q?", "answer": "1", "image": image(1)} | change, 0)
    assert question.error == error


@pytest.mark.parametrize(
    "value, precision",
    [(1.0, 1), (0, 0), (1e9, None), (float("inf"), None), (float("nan"), None), (-1, None), ("2", None)],
)
def test_precision_of_a_row(value, precision):
    row = {"question": "Q?", "answer": 2.0, "image": image(1), "precision": value}
    assert TASKS["mathvista"].ask(row, 0)[0].precision == precision
    assert TASKS["mathvista"].ask(row, 0)[0].reference == "2"


def test_ids_that_are_there_twice_are_told_apart(tmp_path):
    rows = [{"id": i, "question": "Q?", "answer": "1", "image": image(n)} for n, i in enumerate(("x", "y", "x", "x"))]
    folder = write_table(tmp_path, "test", rows, image=datasets.Image())
    asked = questions_of(TASKS["mmmu"], open_rows(TASKS["mmmu"], str(folder), **OPTIONS), limit=0)
    assert [q.id for q in asked] == ["x", "y", "x#2", "x#3"]


@pytest.mark.parametrize("change", [{"aggregated_human_label_good_images": "2"}, {"context": None}, {"concept": 1}])
def test_a_broken_row_of_vlind(sources, change):
    row = json.loads((pathlib.Path(sources["vlind"]) / "data.json").read_text())[0]
    assert [q.error for q in TASKS["vlind"].ask(row | change, 0)] == ["bad_row"]
    votes = {"aggregated_human_label_good_images": {"0": "many", "1": None, "4": 2}}
    assert {q.part for q in TASKS["vlind"].ask(row | votes, 0)} == {"a", "b", "c", "d4"}


def test_pictures_come_in_every_form(tmp_path):
    """The same picture as bytes, as a path in the folder, in a list, numbered: read from parquet to the same pixels."""
    data = image(7)["bytes"]
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "7.png").write_bytes(data)
    of_bytes, of_path = {"bytes": data, "path": None}, {"bytes": None, "path": "pictures/7.png"}
    forms = {
        "bytes": ("image", datasets.Image(), of_bytes),
        "path": ("image", datasets.Value("string"), "pictures/7.png"),
        "struct": ("image", {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}, of_path),
        "binary": ("image", datasets.Value("binary"), data),
        "list": ("images", datasets.List(datasets.Image()), [of_bytes]),
        "paths": ("images", datasets.List(datasets.Value("string")), ["pictures/7.png"]),
        "numbered": ("image_1", datasets.Image(), of_bytes),
    }
    seen = set()
    for name, (column, feature, value) in forms.items():
        folder = tmp_path / name
        columns = {"question": ["Q?"], "answer": ["1"], column: [value]}
        text = datasets.Value("string")
        features = datasets.Features({"question": text, "answer": text, column: feature})
        folder.mkdir()
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "test-0.parquet")
        if "path" in name or name == "struct":
            (folder / "pictures").symlink_to(tmp_path / "pictures")
        rows = open_rows(TASKS["mmmu"], str(folder), **OPTIONS)
        (question,) = questions_of(TASKS["mmmu"], rows, limit=0)
        assert question.error is None and len(question.images) == 1, name
        roots = (*rows.image_roots, str(tmp_path))  # where the link leads
        seen.add(np.asarray(images_lib.read_image(question.images[0], image_roots=roots)).tobytes())
    assert len(seen) == 1


# -- numbers ------------------------------------------------------------------------------------------------------


def answer(question, sample, right, lenient=None):
    lenient = right if lenient is None else lenient
    return Answer(
        question, sample, "", "x", right, "word", lenient, tokens=10 + sample, is_valid=sample == 0, is_truncated=False
    )


def test_pass_and_avg():
    asked = [Question(str(i), (), "", "", group="ab"[i % 2]) for i in range(4)]
    right = {0: (True, True), 1: (True, False), 2: (False, False), 3: (False, None)}
    answers = [answer(asked[i], s, v, lenient=True) for i, pair in right.items() for s, v in enumerate(pair)]
    n = summarise(TASKS["mmmu"], answers, seed=0)
    assert (n["questions"], n["samples"], n["unjudged"]) == (4, 8, 1)
    assert (n["pass"], n["avg"], n["avg_lenient"]) == (50.0, 37.5, 100.0)
    assert (n["format_valid"], n["truncated"], n["tokens"]) == (50.0, 0.0, 10.5)
    assert n["groups"] == {"a": {"questions": 2, "avg": 50.0}, "b": {"questions": 2, "avg": 25.0}}
    assert n["avg_low"] < n["avg"] < n["avg_high"]


def test_interval():
    assert interval([], seed=0) == (None, None) and interval([1.0], seed=0) == (100.0, 100.0)
    values = np.random.default_rng(0).random(400) < 0.3
    low, high = interval(values, seed=1)
    wide = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 400)
    assert low == pytest.approx(100 * (values.mean() - wide), abs=1)
    assert high == pytest.approx(100 * (values.mean() + wide), abs=1)
    assert interval(values, seed=1) == (low, high)


@pytest.mark.parametrize("name", list(TASKS))
def test_a_number_over_nothing_is_none(sources, name):
    numbers = summarise(TASKS[name], [], seed=0)
    assert numbers["questions"] == numbers["samples"] == numbers["unjudged"] == 0
    assert set(numbers.values()) == {0, None}
    assert why_nothing(numbers) == "n/a: no question was asked"
    asked = questions(sources, name)
    unjudged = summarise(TASKS[name], [dataclasses.replace(answer(q, 0, True), is_correct=None) for q in asked], seed=0)
    assert unjudged["avg"] is unjudged["pass"] is unjudged["avg_low"] is None and unjudged["unjudged"] == len(asked)
    assert why_nothing(unjudged) == "n/a: no answer has a verdict yet" and unjudged["format_valid"] == 100.0
    assert why_nothing(summarise(TASKS[name], [answer(q, 0, False) for q in asked], seed=0)) is None
