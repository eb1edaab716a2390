"""The images of a role's view: cut out, blanked, made smaller, taken from elsewhere; and rows that have none."""

import datasets
import numpy as np
import pytest
from helpers import make_processor_folder
from PIL import Image
from tiny_rows import config, encode, picture_bytes, write_jsonl

from vigos_jax.data.examples import Encoder
from vigos_jax.data.images import BadImage
from vigos_jax.data.processor import AS_THE_FOLDER, PixelLimits, Processor
from vigos_jax.data.sources import VIEW_COLUMNS, load_source
from vigos_jax.data.views import ImageView, box_of
from vigos_jax.errors import InputError

SIZE = (120, 90)
CROP = ImageView("crop", "box")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def processor(request, tmp_path_factory):
    return Processor.load(make_processor_folder(tmp_path_factory.mktemp("model"), family=request.param))


def noise(seed=0, size=SIZE):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def row(*, images=None, id="r", **columns):
    """As a source gives it."""
    own = {"id": id, "problem": "Q?", "answer": "a", "images": [noise()] if images is None else images}
    return own | {VIEW_COLUMNS: columns}


def seen(view, processor, **columns):
    example = encode(row(**columns), processor, views=(view,))
    assert example.bad_reason is None, example.complaint
    return example.views[view]


def same(images, *pictures, processor, limits=AS_THE_FOLDER):
    wanted = [processor.encode_image(picture, limits) for picture in pictures]
    return [i.grid for i in images] == [w.grid for w in wanted] and all(
        np.array_equal(i.patches, w.patches) for i, w in zip(images, wanted, strict=True)
    )


BOXES = {
    "a list": [10, 20, 70, 80],
    "floats": [9.6, 19.5, 69.2, 79.9],
    "a tuple": (10, 20, 70, 80),
    "numpy": np.array([10, 20, 70, 80]),
    "a literal": "[10, 20, 70, 80]",
    "several": [[10, 50, 30, 80], [40, 20, 70, 60]],
    "a literal of a tuple": "(10, 20, 70, 80)",
    "a literal of several": "[[10, 50, 30, 80], [40, 20, 70, 60]]",
    "numpy of several": np.array([[10, 50, 30, 80], [40, 20, 70, 60]]),
}
WHOLE = (10, 20, 70, 80)


@pytest.mark.parametrize("name", BOXES)
def test_a_crop_is_the_box_of_the_row(processor, name):
    box = (9, 19, 70, 80) if name == "floats" else WHOLE
    assert same(seen(CROP, processor, box=BOXES[name]), noise().crop(box), processor=processor)


def test_a_mask_marks_a_box(processor):
    mask = Image.new("L", SIZE)
    mask.paste(1, (10, 20, 40, 60))
    mask.paste(255, (50, 70, 70, 80))
    palette = mask.copy()
    palette = Image.fromarray(np.array(mask)).convert("P")
    palette.putpalette([0, 0, 0] + [1, 0, 0] * 255)
    labels = np.zeros((SIZE[1], SIZE[0]), np.uint16)
    labels[20:60, 10:40], labels[70:80, 50:70] = 1, 1000
    clear = Image.merge("LA", (Image.new("L", SIZE, 255), mask.point(lambda x: 255 * (x > 0))))
    values = [mask, mask.point(lambda x: 255 * (x > 0)).convert("1"), mask.convert("RGB"), palette, clear]
    values += [clear.convert("RGBA"), Image.fromarray(labels), Image.fromarray(labels.astype(np.int32)), [mask]]
    for value in values:
        assert same(seen(CROP, processor, box=value), noise().crop(WHOLE), processor=processor)


@pytest.mark.parametrize(
    "box, margin, want",
    [
        ([40, 30, 80, 60], 0.5, (20, 15, 100, 75)),
        ([40, 30, 80, 60], 10.0, (0, 0, 120, 90)),
        ([0, 0, 120, 90], 1.0, (0, 0, 120, 90)),
        ([40, 30, 80, 60], 0.01, (39, 29, 81, 61)),
    ],
)
def test_a_margin_stays_within_the_image(processor, box, margin, want):
    got = seen(ImageView("crop", "box", margin), processor, box=box)
    assert same(got, noise().crop(want), processor=processor)


@pytest.mark.parametrize("box", [[0, 0, 2, 2], [119, 89, 120, 90], [60, 45, 61, 46], [0, 40, 120, 41]])
def test_a_small_box_is_made_as_large_as_a_visual_token(processor, box, monkeypatch):
    cut, real = [], Image.Image.crop
    monkeypatch.setattr(Image.Image, "crop", lambda self, at: cut.append(at) or real(self, at))
    seen(CROP, processor, box=box)
    (x1, y1, x2, y2), least = cut[0], processor.merge_unit
    assert 0 <= x1 and x2 <= 120 and 0 <= y1 and y2 <= 90 and min(x2 - x1, y2 - y1) == least
    assert x1 <= box[0] and y1 <= box[1] and x2 >= box[2] and y2 >= box[3]


@pytest.mark.parametrize(
    "value, kind, message",
    [
        (None, "no_box", "box is None"),
        ("  ", "no_box", "box is '  '"),
        ([], "no_box", "box is empty"),
        ([1, 2, 3], "bad_box", "not four numbers"),
        ([1, 2, 3, 4, 5], "bad_box", "not four numbers"),
        (["1", "2", "3", "4"], "bad_box", "not four numbers"),
        ([1, 2, True, 4], "bad_box", "not four numbers"),
        ([1, 2, None, 4], "bad_box", "not four numbers"),
        ([[1, 2, 30, 40], [1, 2]], "bad_box", "not four numbers"),
        ([[1, 2, 30, 40], None], "bad_box", "not four numbers"),
        ([1, 2, float("nan"), 4], "bad_box", "must be finite"),
        ([1, 2, float("inf"), 4], "bad_box", "must be finite"),
        ([10, 10, 121, 20], "bad_box", r"in pixels of an image of 120 x 90"),
        ([-1, 10, 12, 20], "bad_box", r"\(-1, 10, 12, 20\), which must be \(x1, y1, x2, y2\)"),
        ([30, 10, 20, 20], "bad_box", "x1 < x2"),
        ([20, 10, 20, 20], "bad_box", "x1 < x2"),
        ([10, 10, 20, 91], "bad_box", "120 x 90"),
        ([10, 10, 10.4, 20], "bad_box", "in pixels"),
        ([0.1, 0.2, 0.5, 0.6], "bad_box", "shares of the image and other scales are not read"),
        ([0, 0, 1, 1], "bad_box", "shares of the image"),
        ("[0.1, 0.2, 0.5, 0.6]", "bad_box", "shares of the image"),
        ([1, 2, 10**400, 4], "bad_box", "not four numbers"),
        ("[]", "no_box", "box is empty"),
        ({"x1": 1}, "bad_mask", "box: image_missing"),
        (7, "bad_mask", "box: bad_image_type"),
        ("nowhere.png", "bad_mask", "box: image_"),
        (b"no image", "bad_mask", "box: image_unreadable"),
        (Image.new("L", (90, 120), 255), "bad_mask", "box has 90 x 120 pixels, and its image 120 x 90"),
        (Image.new("L", SIZE), "bad_mask", "marks nothing"),
    ],
)
def test_a_box_that_is_none_makes_a_bad_row(processor, value, kind, message):
    example = encode(row(box=value), processor, views=(CROP,))
    assert example.bad_reason == kind and not example.views and not example.images
    with pytest.raises(BadImage, match=message):
        box_of(value, SIZE, column="box", image_roots=())
    assert encode(row(box=value), processor).bad_reason is None, "who asks for no view reads no box"


def test_a_crop_is_of_one_image(processor):
    two = row(images=[noise(), noise(1)], box=[0, 0, 50, 50])
    assert encode(two, processor, views=(CROP,), max_images=2).complaint.endswith(
        "box is for one image, and the row has 2"
    )
    video = row(images=[{"frames": [noise(), noise(1)], "fps": 2.0}], box=[0, 0, 50, 50])
    assert encode(video, processor, views=(CROP,)).bad_reason == "crop_of_several"


def test_blank_images_have_the_sizes_of_the_rows_own(processor):
    view = ImageView("blank")
    example = encode(row(images=[noise(), noise(1, (60, 200))]), processor, views=(view,), max_images=2)
    assert [i.grid for i in example.views[view]] == [i.grid for i in example.images]
    for image in example.views[view]:
        assert np.ptp(image.patches.reshape(len(image.patches), 3, -1), axis=(0, 2)).max() == 0, "one shade a channel"
    video = row(images=[{"frames": [noise(), noise(1)], "fps": 2.0}])
    example = encode(video, processor, views=(view,))
    assert [(i.grid, i.label) for i in example.views[view]] == [(i.grid, i.label) for i in example.images]


def test_resized_images_have_fewer_pixels(processor):
    unit, own = processor.merge_unit**2, processor.limits()
    for pixels in (unit, 4 * unit, 10**9, 1):
        most = min(max(pixels, unit), own.most)
        limits = PixelLimits(min(most, own.least), most)
        images = seen(ImageView("resized", pixels=pixels), processor)
        assert np.prod(images[0].grid) * processor.patch_size**2 <= most
        assert same(images, noise(), processor=processor, limits=limits)


def test_another_columns_images(processor):
    view = ImageView("other", "marked")
    assert same(seen(view, processor, marked=noise(5)), noise(5), processor=processor)
    two = encode(row(marked=[noise(5), noise(6)]), processor, views=(view,), max_images=2)
    assert same(two.views[view], noise(5), noise(6), processor=processor)
    for value, kind in (
        (None, "no_other_image"),
        ([], "no_other_image"),
        ("x.png", "image_missing"),
        (3, "bad_image_type"),
    ):
        assert encode(row(marked=value), processor, views=(view,), image_roots=("/tmp",)).bad_reason == kind
    many = encode(row(marked=[noise(5), noise(6)]), processor, views=(view,))
    assert many.bad_reason == "too_many_images" and "2 in marked; at most 1" in many.complaint


SHUFFLED = ImageView("shuffled")


def shuffled(rows, index, processor):
    return Encoder(processor, 1, views=(SHUFFLED,))(rows, index)


def test_another_rows_image(processor):
    rows = [row(id=str(i), images=[noise(i)]) for i in range(6)]
    for i in range(6):
        example = shuffled(rows, i, processor)
        assert same(example.views[SHUFFLED], noise((i + 3) % 6), processor=processor)
        assert same(example.images, noise(i), processor=processor)
    # Rows that share the image, have none or cannot be read are passed over.
    rows[3]["images"], rows[4]["images"], rows[5]["images"] = [noise(0)], [], [b"broken"]
    assert same(shuffled(rows, 0, processor).views[SHUFFLED], noise(1), processor=processor)
    assert same(shuffled(rows[:2], 1, processor).views[SHUFFLED], noise(0), processor=processor)
    for few in (rows[:1], [rows[0], rows[3]]):
        assert shuffled(few, 0, processor).bad_reason == "no_other_image"


def test_views_that_do_not_fit_are_made_smaller(processor):
    view = ImageView("other", "large")

    def tokens(example):
        return sum(np.prod(i.grid) for images in (example.images, *example.views.values()) for i in images) // 4

    large = row(images=[noise(0, (300, 300))], large=noise(1, (400, 400)))
    alone = encode(large, processor, views=(view,))
    most = tokens(alone) - 1
    reason = lambda example: "patches_too_long" if tokens(example) > most else None  # noqa: E731
    example = encode(large, processor, views=(view,), too_long=reason)
    assert example.shrunk and example.bad_reason is None and tokens(example) <= most
    assert np.prod(alone.views[view][0].grid) > np.prod(example.views[view][0].grid)


def test_columns_are_read_from_files(processor, tmp_path):
    rows = [
        {"problem": "Q?", "answer": "a", "images": [picture_bytes(i, SIZE)], "box": [10, 20, 70, 80]} for i in range(2)
    ]
    features = datasets.Features(
        {
            "problem": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "box": datasets.List(datasets.Value("float64")),
            "marked": datasets.Image(),
        }
    )
    table = {name: [r[name] for r in rows] for name in rows[0]} | {"marked": [noise(3), noise(4)]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "a.parquet")
    views = (CROP, ImageView("other", "marked"))
    source = load_source(config(tmp_path / "a.parquet"), columns=("box", "marked"))
    example = Encoder(processor, 1, views=views)(source, 1)
    assert example.bad_reason is None, example.complaint
    assert same(example.views[views[1]], noise(4), processor=processor)
    noise(7).save(tmp_path / "marked.png")
    line = {"problem": "Q?", "answer": "a", "images": ["marked.png"], "box": [10, 20, 70, 80], "marked": "marked.png"}
    source = load_source(config(write_jsonl(tmp_path / "a.jsonl", [line])), columns=("box", "marked"))
    example = Encoder(processor, 1, views=views)(source, 0)
    assert same(example.views[CROP], noise(7).crop(WHOLE), processor=processor)
    assert same(example.views[views[1]], noise(7), processor=processor)
    with pytest.raises(
        InputError, match=r"a\.jsonl lacks bbox; it has the columns problem, answer, images, box, marked"
    ):
        load_source(config(tmp_path / "a.jsonl"), columns=("bbox",))


def test_the_student_never_sees_the_column_of_a_role(processor, tmp_path):
    """However it is called: neither found for the row's own images nor overwritten by them."""
    for i in range(3):
        noise(i).save(tmp_path / f"{i}.png")
    fixed, view = {"problem": "Q?", "answer": "a"}, ImageView("other", "img")

    def read(line, view, **columns):
        data = config(write_jsonl(tmp_path / "a.jsonl", [line, line]), max_images=2)
        data.columns.update(columns)
        source = load_source(data, columns=(view.column,))
        example = Encoder(processor, 2, views=(view,))(source, 0)
        return example.bad_reason or (example.images, example.views[view])

    def check(seen, own, other):
        assert same(seen[0], noise(own), processor=processor) and same(seen[1], noise(other), processor=processor)

    check(read(fixed | {"image": "0.png", "img": "1.png"}, view), 0, 1)
    assert read(fixed | {"image": "", "img": "1.png"}, view) == "no_image"
    numbered = ImageView("other", "image_2")
    check(read(fixed | {"image_1": "0.png", "image_2": "1.png"}, numbered), 0, 1)
    mapped = ImageView("other", "image")
    check(read(fixed | {"photo": "0.png", "image": "1.png"}, mapped, images="photo"), 0, 1)
    assert read(fixed | {"photo": None, "image": "1.png"}, mapped, images="photo") == "no_image"
    own_name = ImageView("other", "images")
    check(read(fixed | {"image": "0.png", "images": "1.png"}, own_name, images="image"), 0, 1)
    check(read(fixed | {"image": "0.png", "seen": {"close": "2.png"}}, ImageView("other", "seen.close")), 0, 2)


def test_the_students_image_is_made_smaller_last(processor):
    view, large = ImageView("other", "large"), row(images=[noise(0, (200, 200))], large=noise(1, (400, 400)))
    tokens = lambda images: sum(int(np.prod(i.grid)) for i in images) // 4  # noqa: E731
    own = tokens(encode(large, processor).images)
    for room, is_whole in ((own + 8, True), (own - 1, False)):
        reason = lambda e, room=room: "x_too_long" if tokens(e.images) + tokens(e.views[view]) > room else None  # noqa: E731
        example = encode(large, processor, views=(view,), too_long=reason)
        assert example.shrunk and (tokens(example.images) == own) == is_whole and example.bad_reason is None


def test_boxes_of_float_arrays_are_read(processor, tmp_path):
    features = datasets.Features(
        {
            "problem": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "box": datasets.Array2D((1, 4), "float32"),
            "flat": datasets.List(datasets.Value("float32")),
        }
    )
    line = {"problem": "Q?", "answer": "a", "images": [noise()], "box": [[10, 20, 70, 80]], "flat": [10, 20, 70, 80]}
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({k: [v] for k, v in line.items()}, features=features).to_parquet(path)
    for column in ("box", "flat"):
        view = ImageView("crop", column)
        example = Encoder(processor, 1, views=(view,))(load_source(config(path), columns=(column,)), 0)
        assert example.bad_reason is None, example.complaint
        assert same(example.views[view], noise().crop(WHOLE), processor=processor)
