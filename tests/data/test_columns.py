"""Rows as people have them: other names, nested paths, conversations, labels; and what cannot be told is refused."""

import json
import pathlib

import datasets
import pytest
from tiny_rows import config, encode, picture, picture_bytes, write_jsonl

from vigos_jax.data.chat import BadChat, is_chat, read_chat
from vigos_jax.data.columns import find_columns, lookup
from vigos_jax.data.sources import load_source
from vigos_jax.errors import InputError

IMAGE = {"type": "image"}
TEXT = {"type": "text", "text": "How many?"}
URL = {"type": "image_url", "image_url": {"url": "a.png"}}

# What each row holds, as (problem, reference, number of images); every one has the image a.png beside it.
ROWS = {
    "ours": ({"problem": "How many?", "answer": "2", "images": ["a.png"]}, 1),
    "other names": ({"question": "How many?", "solution": "<answer>2</answer>", "image": "a.png"}, 1),
    "a path": ({"query": "How many?", "ground_truth": "2", "image_path": "a.png"}, 1),
    "numbered images": ({"question": "How many?", "answer": "2", "image_1": "a.png", "image_2": "a.png"}, 2),
    "a list as text": ({"question": "How many?", "answer": "2", "images": "['a.png', 'a.png']"}, 2),
    "empty beside it": ({"problem": "How many?", "answer": 2, "images": [], "image": "a.png"}, 1),
    "capitals": ({"Question": "How many?", "Answer": 2, "Image": "a.png"}, 1),
    "nested ground truth": (
        {"prompt": [{"role": "user", "content": "<image>How many?"}], "images": [{"image": "a.png"}],
         "reward_model": {"style": "rule", "ground_truth": "2"}},
        1,
    ),
    "accepted answers": ({"question": "How many?", "answers": ["2", "two"], "image": {"url": "a.png"}}, 1),
    "a part behind the text": (
        {"messages": [{"role": "user", "content": [TEXT, IMAGE]}, {"role": "assistant", "content": "2"}],
         "images": ["a.png"]},
        1,
    ),
    "parts without a type": (
        {"messages": [{"role": "user", "content": [{"image": "a.png"}, {"text": "How many?"}]}], "answer": "2"},
        1,
    ),
    "a file's address": ({"problem": "How many?", "answer": "2", "image": "file://a.png"}, 1),
    "null beside it": ({"problem": "How many?", "answer": 2, "images": None, "image": "a.png"}, 1),
    "empty bytes": ({"problem": "How many?", "answer": 2.0, "image": {"bytes": "", "path": "a.png"}}, 1),
    "a thought": (
        {"problem": "How many?", "solution": "<think>1+1</think> <answer>2</answer>", "image": "a.png"},
        1,
    ),
    "messages": (
        {"messages": [{"role": "user", "content": [IMAGE, TEXT]}, {"role": "assistant", "content": "\\boxed{2}"}],
         "images": ["a.png"]},
        1,
    ),
    "messages with parts that hold the image": (
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [TEXT, URL]},
                      {"role": "assistant", "content": [{"type": "text", "text": "2"}]}]},
        1,
    ),
    "prompt and a nested answer": (
        {"prompt": [{"role": "user", "content": "<image>How many?"}], "images": ["a.png"], "answer": "2"},
        1,
    ),
    "conversations": (
        {"id": "7", "image": "a.png",
         "conversations": [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "2"}]},
        1,
    ),
    "messages as JSON": (
        {"messages": json.dumps([{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "2"}]),
         "image": "a.png"},
        1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("name", ROWS)
def test_rows_are_understood(tmp_path, processor, name, kind):
    picture(3).save(tmp_path / "a.png")
    row, count = ROWS[name]
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    if kind == "json":
        path = tmp_path / "rows.json"
        path.write_text(json.dumps([row]))
    source = load_source(config(path))
    example = encode_row(source, processor)
    assert (example.bad_reason, example.problem, example.reference) == (None, "How many?", "2"), example.complaint
    assert len(example.images) == count
    if name == "ours":
        assert source.columns.describe() == ""
    elif name in ("other names", "messages", "conversations"):
        assert "problem from" in source.columns.describe()


def encode_row(source, processor, index=0, **options):
    return encode(source[index], processor, image_roots=source.image_roots, max_images=3, **options)


def test_what_was_found_is_said_in_one_line(tmp_path, capsys):
    row = ROWS["messages"][0]
    load_source(config(write_jsonl(tmp_path / "a.jsonl", [row])))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "problem from messages, answer from the assistant's turn in messages, images from images" in said
    load_source(config(write_jsonl(tmp_path / "b.jsonl", [ROWS["ours"][0]])))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_users_columns(tmp_path, processor, kind):
    row = {
        "id": "no", "problem": "wrong", "answer": "wrong", "q": {"text": "How many?"}, "a.b": "2",
        "key": "k1", "turns": [{"content": "unused"}], "shown": "a.png",
    }  # fmt: skip
    picture(3).save(tmp_path / "a.png")
    path = tmp_path / f"rows.{kind}"
    write_jsonl(path, [row]) if kind == "jsonl" else datasets.Dataset.from_list([row]).to_parquet(path)
    columns = {"problem": "q.text", "answer": "a.b", "images": "shown", "id": "key", "options": ""}
    source = load_source(config(path, columns=columns))
    example = encode_row(source, processor)
    assert (example.bad_reason, example.problem, example.reference, example.id) == (None, "How many?", "2", "k1")
    columns["problem"] = "turns.0.content"
    assert encode_row(load_source(config(path, columns=columns)), processor).problem == "unused"
    columns["problem"] = "turns.1.content"  # no row has it
    assert encode_row(load_source(config(path, columns=columns)), processor).bad_reason == "empty_problem"


@pytest.mark.parametrize(
    "row, columns, message",
    [
        ({"question": "q", "query": "q", "answer": "a", "image": ""}, {}, "question and query could be the problem"),
        ({"question": "q", "messages": [{"role": "user", "content": "q"}], "image": ""}, {}, "question and messages"),
        ({"problem": "q", "solution": "a", "gt_answer": "a", "image": ""}, {}, "with config.data.columns.answer"),
        ({"problem": "q", "answer": "a", "image": ""}, {"id": "key"}, "columns.id='key' must be .* columns problem"),
        ({"caption": "q", "answer": "a", "image": ""}, {}, "lacks problem; it has the columns caption.*data.columns"),
        ({"messages": "no turns", "image": ""}, {}, "lacks problem, answer; it has the columns messages, image"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused(tmp_path, row, columns, message):
    mapping = dict.fromkeys(("problem", "answer", "images", "id", "options"), "") | columns
    with pytest.raises(InputError, match=message) as e:
        load_source(config(write_jsonl(tmp_path / "a.jsonl", [row]), columns=mapping))
    assert "\n" not in str(e.value)


def test_columns_may_come_late_in_a_file(tmp_path, processor):
    """Rows without an image among rows with one are bad rows, wherever they stand."""
    picture(3).save(tmp_path / "a.png")
    good = {"problem": "Q?", "answer": "a", "image": "a.png"}
    rows = [
        {"problem": "Q?", "answer": "a"},
        {"problem": "Q?", "image": "a.png"},
        good,
        {"problem": "Q?", "answer": "a"},
    ]
    source = load_source(config(write_jsonl(tmp_path / "a.jsonl", rows)))
    reasons = [encode_row(source, processor, i).bad_reason for i in range(4)]
    assert reasons == ["no_image", "empty_answer", None, "no_image"]


def test_lookup():
    row = {"a.b": 1, "a": {"b": 2, "c": [{"d": 3}, None]}}
    assert [lookup(row, p) for p in ("a.b", "a.c.0.d", "a.c.1.d", "a.c.2", "a.c.x", "z", "")] == [1, 3, *[None] * 5]


@pytest.mark.parametrize(
    "turns, kind",
    [
        ([("user", "a"), ("assistant", "b"), ("user", "c")], "several_turns"),
        ([("assistant", "b"), ("user", "c")], "chat_not_understood"),
        ([("user", "a"), ("tool", "b")], "chat_not_understood"),
        ([("user", [{"type": "audio"}])], "chat_not_understood"),
        ([("user", 3)], "chat_not_understood"),
        ([("user", [URL, IMAGE])], "chat_not_understood"),
        ([("user", "a"), ("assistant", [IMAGE])], "chat_not_understood"),
    ],
)
def test_conversations_that_are_not_one_question(tmp_path, processor, turns, kind):
    messages = [{"role": role, "content": content} for role, content in turns]
    assert is_chat(messages)
    with pytest.raises(BadChat) as e:
        read_chat(messages)
    assert e.value.kind == kind
    picture().save(tmp_path / "a.png")
    rows = [ROWS["messages"][0], {"messages": messages, "images": ["a.png"]}]
    example = encode_row(load_source(config(write_jsonl(tmp_path / "a.jsonl", rows))), processor, 1)
    assert example.bad_reason == kind and example.bad_detail


def test_markers_stand_for_the_images_of_parts():
    chat = read_chat([{"role": "user", "content": [TEXT | {"text": "Is "}, IMAGE, TEXT | {"text": " red?"}]}])
    assert chat.problem == "Is <image> red?" and chat.images == ()
    told = read_chat([{"role": "user", "content": [URL, TEXT | {"text": "Is <image> red?"}]}])
    assert told.problem == "Is <image> red?" and told.images == ("a.png",)


def test_labels_have_their_names(tmp_path, processor):
    labels = datasets.ClassLabel(names=["cat", "dog"])
    features = {"problem": datasets.Value("string"), "answer": labels, "image": datasets.Image()}
    features |= {"options": datasets.List(labels)}
    columns = {"problem": ["Q?"] * 3, "answer": [1, 0, None], "options": [[0, 1], [1], None]}
    columns["image"] = [{"bytes": picture_bytes(3), "path": None}] * 3
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(tmp_path / "a.parquet")
    source = load_source(config(tmp_path / "a.parquet"))
    assert [source[i]["answer"] for i in range(3)] == ["dog", "cat", None]
    assert [source[i]["options"] for i in range(3)] == [["cat", "dog"], ["dog"], None]
    examples = [encode_row(source, processor, i) for i in range(3)]
    assert [e.reference for e in examples] == ["dog", "cat", ""] and examples[2].bad_reason == "empty_answer"


def test_files_of_other_types_keep_their_own(tmp_path, processor):
    """Labels by the names of their file, numbers and texts as they stand: nothing is cast to the first file's types."""
    image = [{"bytes": picture_bytes(3), "path": None}]
    kinds = {
        "a": ({"answer": datasets.ClassLabel(names=["cat", "dog"])}, {"answer": [1]}),
        "b": ({"answer": datasets.ClassLabel(names=["dog", "cat"])}, {"answer": [1]}),
        "c": ({"answer": datasets.Value("int64")}, {"answer": [7]}),
        "d": ({"answer": datasets.Value("string")}, {"answer": ["007"]}),
        "e": ({"answer": datasets.Value("float32")}, {"answer": [0.1]}),
        "f": (
            {"answer": datasets.Value("string"), "options": datasets.List(datasets.Value("string"))},
            {"answer": ["B"], "options": [["red", "blue"]]},
        ),
        "g": ({"answer": datasets.Value("string")}, {"answer": []}),
    }
    (tmp_path / "set").mkdir()
    for name, (features, columns) in kinds.items():
        n = len(columns["answer"])
        features = {"problem": datasets.Value("string"), "image": datasets.Image()} | features
        columns = {"problem": ["Q?"] * n, "image": image * n} | columns
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        table.to_parquet(tmp_path / "set" / f"{name}.parquet")
    source = load_source(config(tmp_path / "set"))
    examples = [encode_row(source, processor, i) for i in range(len(source))]
    assert [e.bad_reason for e in examples] == [None] * 6
    # The answers' words, but for the last: where nothing shows the options, a letter is the option's text.
    assert sorted(e.reference for e in examples) == ["0.1", "007", "7", "blue", "cat", "dog"]


def test_decimals_are_numbers(tmp_path, processor):
    import decimal

    import pyarrow as pa
    import pyarrow.parquet as pq

    answers = pa.array([decimal.Decimal(x) for x in ("1.50", "2.00", "1200.00")])
    table = {"problem": pa.array(["Q?"] * 3), "answer": answers, "image": pa.array([picture_bytes()] * 3)}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    source = load_source(config(tmp_path / "a.parquet"))
    assert [encode_row(source, processor, i).reference for i in range(3)] == ["1.5", "2", "1200"]


def test_a_conversation_in_parquet(tmp_path, processor):
    """Images inside parts stay undecoded, and null fields, which parquet adds to every part, say nothing."""
    part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    turns = datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)})
    shown = {"type": "image", "text": None, "image": {"bytes": picture_bytes(3), "path": None}}
    asked = {"type": "text", "text": "How many?", "image": None}
    said = {"role": "assistant", "content": [{"type": "text", "text": "2", "image": None}]}
    columns = {"messages": [[{"role": "user", "content": [shown, asked]}, said]]}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features({"messages": turns}))
    table.to_parquet(tmp_path / "a.parquet")
    example = encode_row(load_source(config(tmp_path / "a.parquet")), processor)
    assert (example.bad_reason, example.problem, example.reference) == (None, "How many?", "2")
    assert (example.images[0].patches == processor.encode_image(picture(3)).patches).all()


def test_find_columns_prefers_our_own_names():
    columns = find_columns(["question", "problem", "solution", "answer", "image", "images"], where="x")
    assert (columns.problem, columns.answer, columns.images) == ("problem", "answer", ("images", "image"))


def test_every_row_of_the_documentation_is_read(tmp_path, processor):
    """docs/data.md: the formats that people have, each as it stands there."""
    page = pathlib.Path(__file__).resolve().parents[2] / "docs" / "data.md"
    block = page.read_text(encoding="utf-8").split("read as it stands:\n\n```json\n")[1].split("```")[0]
    (tmp_path / "images").mkdir()
    for name in ("7", "8"):
        picture(int(name)).save(tmp_path / "images" / f"{name}.png")
    lines = block.splitlines()
    assert len(lines) >= 8
    for line in lines:
        source = load_source(config(write_jsonl(tmp_path / "rows.jsonl", [line + "\n"])))
        example = encode_row(source, processor)
        assert example.bad_reason is None, (line, example.complaint)
        assert example.reference in ("black", "no", "a cat sleeps")
        assert example.problem in (
            "What color is the cat?",
            "Is the cat in image 1 the cat in image 2?",
            "What happens?",
        )


OPTIONS = ["red", "blue"]


@pytest.mark.parametrize(
    "options, answer, template, problem, reference",
    [
        (OPTIONS, "B", "{letter}. {option}", "Q?\nA. red\nB. blue", "B"),
        (OPTIONS, "blue", "({letter}) {option}", "Q?\n(A) red\n(B) blue", "blue"),
        (OPTIONS, 1, "{letter}. {option}", "Q?\nA. red\nB. blue", "B"),
        (OPTIONS, 1, "", "Q?", "blue"),  # where no letters are shown, a teacher sees the text
        ({"A": "red", "B": "blue"}, "B", "{letter}) {option}", "Q?\nA) red\nB) blue", "B"),
        (["A. red", "B. blue"], "B", "{letter}. {option}", "Q?\nA. red\nB. blue", "B"),
        ("['red', 'blue', None]", "B", "- {option}", "Q?\n- red\n- blue", "B"),
        (None, "B", "{letter}. {option}", "Q?", "B"),
        (OPTIONS, "green", "", "Q?", "green"),  # nobody is asked to choose
        (OPTIONS, "B", "", "Q?", "blue"),  # nobody could say the letter
        (["<image 1>", "<image 2>"], "B", "{letter}. {option}", "Q?\nA. image 1\nB. image 2", "B"),
        (None, [1, 2.5, 3, 4], "", "Q?", "[1, 2.5, 3, 4]"),  # a box is one answer
        (["1", "2", "4"], 4, "{letter}. {option}", "Q?\nA. 1\nB. 2\nC. 4", "4"),
        (OPTIONS, ["blue", "azure"], "", "Q?", "blue"),
        (None, ["5", "five"], "", "Q?", "5"),
        (None, "['5', 'five']", "", "Q?", "5"),
    ],
)
def test_options_and_references(processor, options, answer, template, problem, reference):
    row = {"problem": "Q?", "answer": answer, "images": [picture(3)], "options": options}
    example = encode(row, processor, options_template=template)
    assert (example.bad_reason, example.problem, example.reference) == (None, problem, reference)
    if answer in (["5", "five"], "['5', 'five']"):
        assert example.alternatives == ("five",)


@pytest.mark.parametrize(
    "options, answer, reason",
    [
        (OPTIONS, "green", "answer_not_an_option"),
        (OPTIONS, 2, "answer_not_an_option"),
        (["1", "2", "4"], 1, "unclear_answer_index"),  # the first option's text, or the second's number
        (OPTIONS, ["A", "B"], "several_options_right"),
        ("red or blue", "red", "bad_options"),
        (None, [], "empty_answer"),
        (None, [{"a": 1}], "bad_answer_type"),
    ],
)
def test_options_that_cannot_be_asked(processor, options, answer, reason):
    row = {"problem": "Q?", "answer": answer, "images": [picture(3)], "options": options}
    assert encode(row, processor, options_template="{letter}. {option}").bad_reason == reason


def test_a_number_beyond_the_options_is_bad_whatever_is_shown(processor):
    row = {"problem": "Q?", "answer": 2, "images": [picture(3)], "options": OPTIONS}
    assert encode(row, processor).bad_reason == "answer_not_an_option"


def test_a_question_that_shows_its_options_is_left_alone(processor):
    row = {"problem": "Q?\n(A) red (B) blue", "answer": "A", "images": [picture(3)], "options": OPTIONS}
    for template in ("{letter}. {option}", ""):
        example = encode(row, processor, options_template=template)
        assert (example.problem, example.reference) == (row["problem"], "A")
