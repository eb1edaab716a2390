"""Small files in the published schemas of the benchmarks, made from nothing."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import datasets
from tiny_rows import picture, picture_bytes

SIZE = (60, 60)
IMAGE, TEXT = datasets.Image(), datasets.Value("string")


def image(shade: int) -> dict[str, Any]:
    return {"bytes": picture_bytes(shade, SIZE), "path": None}


def write_table(folder: pathlib.Path, split: str, rows: Sequence[dict[str, Any]], **features) -> pathlib.Path:
    """`folder/SPLIT-00000.parquet`; columns that are not named are texts or, where their values say so, numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {str: TEXT, int: datasets.Value("int64"), float: datasets.Value("float64")}
    schema = {}
    for name in rows[0]:
        value = next((row[name] for row in rows if row[name] is not None), "")
        schema[name] = features.get(name) or kinds[type(value)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(schema))
    table.to_parquet(folder / f"{split}-00000.parquet")
    return folder


def make_all(root: pathlib.Path) -> dict[str, str]:
    """One source per task; returns {task: folder}."""
    images, texts = datasets.List(IMAGE), datasets.List(TEXT)
    out = {
        "mm_vet": write_table(
            root / "mm_vet",
            "test",
            [
                {"problem": "<image>What is x?", "answer": "-1<OR>minus one", "images": [image(1)]},
                {"problem": "<image>Who?", "answer": "a cat<AND>a dog", "images": [image(2)]},
            ],
            images=images,
        ),
        "mmmu": write_table(
            root / "mmmu",
            "test",
            [
                {
                    "question": "Compare <image 1> and <image 2>.",
                    "options": "['left', 'right', 'both']",
                    "answer": "B",
                    "image_1": image(1),
                    "image_2": image(2),
                    "image_3": None,
                    "subject": "Art",
                },
                {
                    "question": "Solve.",
                    "options": "[]",
                    "answer": "12",
                    "image_1": image(3),
                    "image_2": None,
                    "image_3": None,
                    "subject": "Math",
                },
            ],
            image_1=IMAGE,
            image_2=IMAGE,
            image_3=IMAGE,
        ),
        "mmmu_pro": write_table(
            root / "mmmu_pro",
            "test",
            [{"problem": "Which?", "options": [f"o{i}" for i in range(10)], "answer": "J", "images": [image(4)]}],
            images=images,
            options=texts,
        ),
        "mmmu_pro_vision": write_table(
            root / "mmmu_pro_vision",
            "test",
            [{"options": "['a b', 'c d']", "answer": "A", "image": image(5)}],
            image=IMAGE,
        ),
        "mathverse": write_table(
            root / "mathverse",
            "test",
            [
                {"question": f"Find x. v{v}", "answer": "C", "image": image(v), "problem_version": f"V{v % 2}"}
                for v in range(4)
            ],
            image=IMAGE,
        ),
        "mathvista": write_table(
            root / "mathvista",
            "test",
            [
                {
                    "pid": "7",
                    "problem": "How long?",
                    "answer": "1.2",
                    "precision": 1.0,
                    "choices": None,
                    "image": image(1),
                },
                {
                    "pid": "8",
                    "problem": "Which one?",
                    "answer": "yes",
                    "precision": None,
                    "choices": ["no", "yes"],
                    "image": image(2),
                },
            ],
            image=IMAGE,
            choices=texts,
        ),
        "mmsi": write_table(
            root / "mmsi",
            "test",
            [{"id": 3, "question": "Where? A: here B: there", "answer": "A", "images": [image(1), image(2), image(3)]}],
            images=images,
        ),
        "realworldqa": write_table(
            root / "realworldqa", "test", [{"problem": "How many?", "answer": "3", "images": [image(1)]}], images=images
        ),
        "cv_bench": write_table(
            root / "cv_bench",
            "test",
            [
                {
                    "idx": i,
                    "type": "2D" if i < 3 else "3D",
                    "task": "Count",
                    "source": s,
                    "image": image(i),
                    "question": "How many?",
                    "choices": ["1", "2"],
                    "answer": "(A)",
                    "prompt": "How many? (A) 1 (B) 2",
                }
                for i, s in enumerate(["ADE20K", "ADE20K", "COCO", "Omni3D", "Omni3D"])
            ],
            image=IMAGE,
            choices=texts,
        ),
        "vilp_f": write_table(
            root / "vilp",
            "train",
            [
                {
                    "question": "Apples are red. What colour is it?",
                    **{f"image{n}": image(10 * r + n) for n in (1, 2, 3)},
                    **{f"answer{n}": a for n, a in enumerate(("red", "blue", "green"), start=1)},
                }
                for r in range(2)
            ],
            image1=IMAGE,
            image2=IMAGE,
            image3=IMAGE,
        ),
    }
    out["vilp_p"] = out["vilp_f"]
    out["vlind"] = make_vlind(root / "vlind")
    return {task: str(folder) for task, folder in out.items()}


def make_vlind(folder: pathlib.Path) -> pathlib.Path:
    """Two instances, the second with no picture that people found good."""
    rows = []
    for i, votes in enumerate(({"0": 3, "1": 1, "4": 2}, {"0": 1, "1": None})):
        context, fact = f"The sky is green {i}", f"The sky is blue {i}"
        rows.append(
            {
                "concept": "color",
                "context_id": i,
                "context": context,
                "factual_context": fact,
                "true_statement": "The sky is green.",
                "false_statement": "The sky is blue.",
                "existent_noun": "a sky",
                "non-existent_noun": "a cow",
                "best_img_id": "4",
                "aggregated_human_label_good_images": votes,
            }
        )
        for kind, text, numbers in (("counterfactual", context, (0, 1, 4)), ("factual", fact, (0,))):
            place = folder / "images" / kind / "color" / f"{i}_{text}"
            place.mkdir(parents=True)
            for n in numbers:
                picture(n, SIZE).save(place / f"{n}.jpg")
    (folder / "data.json").write_text(json.dumps(rows))
    return folder
