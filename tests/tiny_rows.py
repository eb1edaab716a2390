"""Data sets of a few rows: pictures of one colour, tables and files of them."""

import io
import json

import datasets
import ml_collections
from PIL import Image

from vigos_jax.data.examples import Encoder


def picture(shade=0, size=(30, 40)):
    return Image.new("RGB", size, (shade, 2 * shade, 255 - shade))


def picture_bytes(shade=0, size=(30, 40)):
    file = io.BytesIO()
    picture(shade, size).save(file, "PNG")
    return file.getvalue()


def config(source, **fields):
    values = {"source": str(source), "split": "train", "shuffle": True, "workers": 0}
    columns = dict.fromkeys(("problem", "answer", "images", "id", "options"), "")
    values |= {
        "fields": (),
        "max_images": 1,
        "max_bad_fraction": 0.1,
        "columns": columns,
        "image_folder": "",
        "options_template": "",
        "max_pixels": 0,
        "min_pixels": 0,
    }
    return ml_collections.ConfigDict(values | fields)


def rows(n):
    return [{"problem": f"<image>Question {i}?", "answer": str(i), "images": [picture_bytes(i)]} for i in range(n)]


def write_parquet(path, rows, feature="list"):
    """`images` as Image features (one or a list), or as plain structs of bytes and path."""
    struct = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    image = {
        "one": datasets.Image(),
        "list": datasets.List(datasets.Image()),
        "struct": struct,
        "structs": datasets.List(struct),
        "path": datasets.Value("string"),
    }[feature]
    first = next(iter(rows))
    features = {
        name: image if name in ("images", "image") else datasets.Value("int64" if type(value) is int else "string")
        for name, value in first.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row[name] for row in rows] for name in first}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    return path


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def encode(row, processor, **options):
    return Encoder(processor, **{"max_images": 1} | options)({7: row}, 7)


def small_rows(n):
    return [row | {"id": f"row{i}"} for i, row in enumerate(rows(n))]


GOOD = {"id": "r", "problem": "Q?", "answer": "a", "images": [picture_bytes()]}
