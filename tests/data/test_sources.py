"""Rows from every kind of source, their columns, and what they are told apart by."""

import copy
import json

import numpy as np
import pytest
from tiny_rows import GOOD, config, encode, picture, picture_bytes, rows, small_rows, write_jsonl, write_parquet

from vigos_jax.data.sources import fingerprint, load_source
from vigos_jax.errors import InputError


@pytest.mark.parametrize("column", ["images", "image"])
@pytest.mark.parametrize("feature", ["one", "list", "struct", "structs"])
def test_parquet(tmp_path, processor, feature, column):
    one = {"bytes": picture_bytes(3), "path": None}
    image = one if feature in ("one", "struct") else [one]
    table = [
        {"problem_id": 11 + i, "id": f"other{i}", "problem": f"Q{i}", "answer": i, column: image} for i in range(3)
    ]
    source = load_source(config(write_parquet(tmp_path / "a.parquet", table, feature)))
    assert len(source) == 3
    row = source[1]
    assert (row["id"], row["problem"], row["answer"]) == ("12", "Q1", 1)
    example = encode(source[0], processor)
    assert (example.id, example.bad_reason, example.reference) == (
        "11",
        None,
        "0",
    )  # the integer 0 is an answer
    expected = processor.encode_image(picture(3))
    np.testing.assert_array_equal(example.images[0].patches, expected.patches)
    assert example.images[0].grid == expected.grid


def test_parquet_with_paths(tmp_path, processor):
    (tmp_path / "pictures").mkdir()
    picture(5).save(tmp_path / "pictures" / "a.png")
    table = [{"problem": "Q", "answer": "a", "images": path} for path in ("pictures/a.png", "../a.png")]
    source = load_source(config(write_parquet(tmp_path / "a.parquet", table, "path")))
    reasons = [encode(row, processor, image_roots=source.image_roots).bad_reason for row in (source[0], source[1])]
    assert reasons == [None, "image_outside_folder"]


def test_folder_of_parquet(tmp_path):
    for split, n in (("train-00000-of-00002", 2), ("train-00001-of-00002", 3), ("test-00000-of-00001", 1)):
        write_parquet(tmp_path / "set" / "data" / f"{split}.parquet", rows(n))
    (tmp_path / "set" / "README.md").write_text("# A data set\n")
    picture().save(tmp_path / "set" / "cover.png")
    assert len(load_source(config(tmp_path / "set"))) == 5
    assert len(load_source(config(tmp_path / "set", split="test"))) == 1
    with pytest.raises(InputError, match=r"has no split 'val'; its files are .*test-00000.*train-00001"):
        load_source(config(tmp_path / "set", split="val"))


def test_jsonl(tmp_path, processor):
    (tmp_path / "a").mkdir()
    picture(1).save(tmp_path / "a" / "1.png")
    picture(2).save(tmp_path / "outside.png")
    good = {"problem": "<image>\n  Café?", "answer": "Answer: B", "images": ["1.png"], "extra": {"x": 1}}
    lines = [
        good | {"id": "x"},
        "\n",
        good | {"image": "1.png", "images": "1.png"},
        "{broken\n",
        "[1]\n",
        good | {"images": ["../outside.png"]},
        json.dumps(good | {"id": "last"}),  # no line end
    ]
    source = load_source(config(write_jsonl(tmp_path / "a" / "data.jsonl", lines)))
    assert len(source) == 6 and source[0]["extra"] == {"x": 1}
    examples = [encode(source[i], processor, image_roots=source.image_roots) for i in range(6)]
    assert [e.id for e in examples] == ["x", "1", "2", "3", "4", "last"]
    assert [e.bad_reason for e in examples] == [
        None,
        None,
        "bad_json",
        "bad_json",
        "image_outside_folder",
        None,
    ]
    assert (examples[0].problem, examples[0].reference) == ("Café?", "B")
    np.testing.assert_array_equal(examples[0].images[0].patches, processor.encode_image(picture(1)).patches)


@pytest.mark.parametrize(
    "name, message",
    [
        ("", "does not exist"),
        ("missing.jsonl", "does not exist"),
        ("/missing/folder", "does not exist"),
        ("a b", "does not exist"),
        ("no-one/no-such-set", "cannot be loaded"),  # tests have no network
        ("empty", "holds no such data"),
        ("text.txt", "holds no such data"),
        ("broken.parquet", "cannot be loaded"),
        ("empty.jsonl", "no usable row"),
        ("lists.jsonl", "no usable row"),
        ("lacking.jsonl", "lacks answer, images; it has the columns problem, pictures"),
        ("lacking.parquet", "lacks images; it has the columns question, answer"),
    ],
)
def test_bad_source(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for file in ("text.txt", "broken.parquet", "empty.jsonl"):
        (tmp_path / file).write_text("" if file.startswith("empty") else "hello")
    write_jsonl(tmp_path / "lists.jsonl", ["[]\n", "3\n"])
    write_jsonl(tmp_path / "lacking.jsonl", [{"problem": "x", "pictures": []}])
    write_parquet(tmp_path / "lacking.parquet", [{"question": "x", "answer": "y"}])
    with pytest.raises(InputError, match=message) as e:
        load_source(config(name))
    assert "\n" not in str(e.value) and (name in str(e.value))


def test_line_numbers_count_blank_lines(tmp_path):
    good = {"problem": "Q?", "answer": "a", "images": "p"}
    lines = ["\n", good | {"id": "a"}, "  \n", "\t\n", "{broken\n", good | {"id": "b"}, "\n", json.dumps(good)]
    source = load_source(config(write_jsonl(tmp_path / "a.jsonl", lines)))
    assert [source.line(i) for i in range(len(source))] == [2, 5, 6, 8]
    assert [source[i]["id"] for i in (0, 2, 3)] == ["a", "b", "3"]
    assert all(type(source.line(i)) is int for i in range(4))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_further_columns(tmp_path, processor, kind):
    table = [{"problem": "Q?", "answer": "a", "images": [], "caption": f" red {i} ", "hint": "h"} for i in range(2)]
    if kind == "jsonl":
        path = write_jsonl(tmp_path / "a.jsonl", table)
    else:
        for row in table:
            row["images"] = [{"bytes": picture_bytes(), "path": None}]
        path = write_parquet(tmp_path / "set" / "train.parquet", table)
        path = path.parent if kind == "folder" else path
    assert "caption" in load_source(config(path, fields=("caption",)))[1]
    if kind != "jsonl":  # only what is asked for is read
        assert load_source(config(path, fields=("caption",)))[1].keys() & {"caption", "hint"} == {"caption"}
    with pytest.raises(InputError, match="lacks scene; it has the columns problem, answer, images, caption, hint") as e:
        load_source(config(path, fields=("caption", "scene")))
    assert "\n" not in str(e.value)
    row = load_source(config(path, fields=("caption", "hint")))[1] | {"images": picture()}
    example = encode(row, processor, fields=("caption", "hint"))
    assert example.bad_reason is None and example.fields == {"caption": " red 1 ", "hint": "h"}  # the texts as they are
    assert encode(row, processor).fields == {}


def test_jsonl_source_can_be_pickled(tmp_path):
    source = load_source(config(write_jsonl(tmp_path / "a.jsonl", [{**GOOD, "images": "p"}] * 3)))
    twin = copy.deepcopy(source)
    assert twin[2] == source[2] and twin.image_roots == source.image_roots


def test_fingerprint(tmp_path):
    source = load_source(config(write_jsonl(tmp_path / "a.jsonl", [{**GOOD, "images": "p"}] * 20)))
    moved = load_source(config(write_jsonl(tmp_path / "b" / "b.jsonl", [{**GOOD, "images": "p"}] * 20)))
    assert fingerprint(source) == fingerprint(moved) and fingerprint(source).startswith("rows=20 ")
    assert fingerprint(small_rows(20)) != fingerprint(small_rows(21))
    changed = small_rows(20)
    changed[19]["answer"] = "other"
    assert fingerprint(small_rows(20)) != fingerprint(changed)
