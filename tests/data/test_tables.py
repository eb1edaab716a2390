"""Folders of parquet: which files are read is a rule, and what is left out is said."""

import json

import datasets
import pytest
from helpers import make_processor_folder
from tiny_rows import config, encode, picture, picture_bytes, rows, write_jsonl, write_parquet

from vigos_jax.data.processor import Processor
from vigos_jax.data.sources import load_source
from vigos_jax.errors import InputError


def make(folder, *names):
    for i, name in enumerate(names):
        write_parquet(folder / name, rows(2**i))  # so that the number of rows says which were read
    return folder


@pytest.mark.parametrize(
    "names, split, read",
    [
        (["train.parquet", "extra.parquet"], "train", 3),
        (["geo_train.parquet", "chart_train.parquet", "attest.parquet"], "train", 7),
        (["a.parquet"], "train", 1),
        (["a.parquet", "b/c.parquet"], "test", 3),  # no name says a split: all is what was asked for
        (["train.parquet", "test.parquet"], "train", 1),
        (["train.parquet", "test.parquet"], "test", 2),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "val.parquet"], "train", 3),
        (["data/train/0000.parquet", "data/test/0000.parquet"], "train", 1),
        (["x.parquet", "dev-00000-of-00001-0123456789abcdef.parquet"], "validation", 2),
        (["geo.parquet", "chart.parquet"], "chart", 2),
        (["mine_train.parquet", "mine_test.parquet"], "train", 1),
        (
            ["train.parquet", "test-dev.parquet", "testA.parquet", "validation_set.parquet", "minival.parquet"],
            "train",
            1,
        ),
        (["a.parquet", ".b.parquet", "_temporary/c.parquet"], "train", 1),
        (["a.parquet", "attesting.parquet"], "train", 3),
    ],
)
def test_which_files_are_read(tmp_path, names, split, read):
    assert len(load_source(config(make(tmp_path / "set", *names), split=split))) == read


def test_what_is_left_out_is_said(tmp_path, capsys):
    folder = make(tmp_path / "set", "train.parquet", "test.parquet")
    (folder / "more.jsonl").write_text("")
    load_source(config(folder))
    said = capsys.readouterr().err
    assert "1 parquet file(s) read as split 'train' (train.parquet); left out: test.parquet; more.jsonl" in said
    load_source(config(make(tmp_path / "other", "a.parquet", "b.parquet")))
    assert "left out" not in capsys.readouterr().err
    with pytest.raises(InputError, match="has no split 'validation'; its files are test.parquet, train.parquet"):
        load_source(config(folder, split="validation"))


def test_neighbours_break_nothing(tmp_path):
    folder = make(tmp_path / "set [v2] *", "train.parquet")
    write_jsonl(folder / "train.jsonl", [{"other": 1}])
    (folder / "images").mkdir()
    picture().save(folder / "images" / "train.png")
    for name in (".train.parquet.crc", "train.csv", "README.md", "._train.parquet"):
        (folder / name).write_bytes(b"\0not parquet")
    assert len(load_source(config(folder))) == 1


def test_a_folder_without_parquet_says_what_is_there(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("{}")
    with pytest.raises(
        InputError, match=r"is a folder without parquet files \(it has train.jsonl\); choices: a .jsonl"
    ):
        load_source(config(tmp_path / "set"))


def test_a_broken_file_of_a_folder_is_named(tmp_path):
    folder = make(tmp_path / "set", "a.parquet")
    (folder / "b.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(InputError, match="b.parquet, cannot be loaded") as e:
        load_source(config(folder))
    assert "\n" not in str(e.value)


def test_what_the_library_saved_to_disk(tmp_path):
    table = datasets.Dataset.from_list([{"problem": f"Q{i}", "answer": "a", "image": "p"} for i in range(3)])
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    assert load_source(config(tmp_path / "one"))[2]["problem"] == "Q2"
    assert len(load_source(config(tmp_path / "splits", split="test"))) == 1
    with pytest.raises(InputError, match="has no split 'val'; choices: train, test"):
        load_source(config(tmp_path / "splits", split="val"))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
def test_sources_behind_links(tmp_path, kind):
    """The hub's cache: a snapshot's files are links into one folder of blobs, named by their content."""
    processor = Processor.load(make_processor_folder(tmp_path / "model"))
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    (snapshot / "images").mkdir(parents=True)
    (blobs / "aa").write_bytes(picture_bytes(3))
    (snapshot / "images" / "a.png").symlink_to("../../../blobs/aa")
    table = [{"problem": "Q?", "answer": "a", "images": "images/a.png"}]
    name = {"jsonl": "train.jsonl", "json": "train.json"}.get(kind, "train.parquet")
    if kind == "json":
        (blobs / "bb").write_text(json.dumps(table))
    else:
        (write_jsonl if kind == "jsonl" else lambda p, t: write_parquet(p, t, "path"))(blobs / "bb", table)
    (snapshot / name).symlink_to("../../blobs/bb")
    (tmp_path / "data").symlink_to(snapshot)
    for place in (snapshot, tmp_path / "data"):
        source = load_source(config(place if kind == "folder" else place / name))
        assert encode(source[0], processor, image_roots=source.image_roots).bad_reason is None


def test_images_in_a_folder_of_their_own(tmp_path):
    processor = Processor.load(make_processor_folder(tmp_path / "model"))
    (tmp_path / "pictures").mkdir()
    picture(3).save(tmp_path / "pictures" / "a.png")
    paths = ["a.png", str(tmp_path / "pictures" / "a.png"), "../model/config.json"]
    path = write_jsonl(tmp_path / "rows" / "a.jsonl", [{"problem": "Q?", "answer": "a", "image": p} for p in paths])
    source = load_source(config(path, image_folder=str(tmp_path / "pictures")))
    reasons = [encode(source[i], processor, image_roots=source.image_roots).bad_reason for i in range(3)]
    assert reasons == [None, None, "image_outside_folder"]
    without = load_source(config(path))
    examples = [encode(without[i], processor, image_roots=without.image_roots) for i in range(2)]
    assert [e.bad_reason for e in examples] == ["image_missing", "image_outside_folder"]
    assert "config.data.image_folder" in examples[1].bad_detail
    with pytest.raises(InputError, match="config.data.image_folder='/no/such' must be a folder"):
        load_source(config(path, image_folder="/no/such"))
