"""Image markers in questions: what is said behind the images, and which questions do not go with their images."""

import pytest
from helpers import make_processor_folder
from tiny_rows import GOOD, encode, picture

from vigos_jax.data.markers import MarkerMismatch, count_markers, without_markers
from vigos_jax.data.processor import Processor


@pytest.mark.parametrize(
    "text, images, asked",
    [
        ("How many?", 3, "How many?"),
        ("<image>\nHow many?", 1, "How many?"),
        ("<image>how many?", 1, "how many?"),
        ("How many?<image>", 1, "How many?"),
        ("How many? <Image>\n", 1, "How many?"),
        ("<image><image>\n<image> Which one?", 3, "Which one?"),
        ("Which one?\n<image> <image>", 2, "Which one?"),
        ("<image 1><image 2> Which one?", 2, "Which one?"),
        ("<image_1> What is it?", 1, "What is it?"),
        ("<|image_1|>\nWhat is it?", 1, "What is it?"),
        ("Describe <image>.", 1, "Describe the image."),
        ("<image 2> What color is the car?", 2, "image 2 What color is the car?"),
        ("<image 2><image 1>Which is first?", 2, "image 2 image 1 Which is first?"),
        ("<|vision_start|><|image_pad|><|vision_end|>What?", 1, "What?"),
        ("<image></image>\nWhat?", 1, "What?"),
        ("<ImageHere> What?", 1, "What?"),
        ("<start_of_image><|image|>[IMG]<image/>What?", 4, "What?"),
        ("In <image-1> and <image:2>?", 2, "In image 1 and image 2?"),
        ("<|image_pad|> and <|vision_start|>", 1, "<|image_pad|> and <|vision_start|>"),
        ("Look at <image> and say", 1, "Look at the image and say"),
        ("In the image <image>, what is red?", 1, "In the image, what is red?"),
        ("a\n<image>\nb", 1, "a\nb"),
        ("Is the car in <image> the car in <image>?", 2, "Is the car in image 1 the car in image 2?"),
        ("<image 2> vs <image 1>: which is larger?", 2, "image 2 vs image 1: which is larger?"),
        ("<image_0> and <image_1>?", 2, "image 1 and image 2?"),
        ("In figure <image 2>, what?", 2, "In figure 2, what?"),
        ("First:\n<image>\nSecond:\n<image>\nWhich?", 2, "First:\nimage 1\nSecond:\nimage 2\nWhich?"),
        ("<image>What differs?<image>", 2, "image 1 What differs? image 2"),
        ("What do <img>, <imagery> and <image do", 1, "What do <img>, <imagery> and <image do"),
    ],
)
def test_markers_go_or_become_words(text, images, asked):
    assert without_markers(text, images=images) == asked
    assert count_markers(asked) == 0


@pytest.mark.parametrize(
    "text, images, videos, message",
    [
        ("<image> Q", 0, 1, "the question has 1 <image>, the row 0 image"),
        ("<image><image> Q", 1, 0, "the question has 2 <image>, the row 1 image"),
        ("<image> Q", 2, 0, "the question has 1 <image>, the row 2 image"),
        ("<image 3> Q", 2, 0, "the question has <image 3>, the row 2 image"),
        ("<image_0> or <image_2> Q", 2, 0, "the question has <image 2>, the row 2 image"),
        ("<video> Q", 1, 0, "the question has 1 <video>, the row 0 video"),
    ],
)
def test_markers_that_do_not_go_with_the_images(text, images, videos, message):
    with pytest.raises(MarkerMismatch, match=message):
        without_markers(text, images=images, videos=videos)


def test_videos_are_counted_by_themselves():
    assert without_markers("Compare <video> with <image>.", images=1, videos=1) == "Compare the video with the image."
    assert without_markers("<video>\nWhat happens?", images=0, videos=1) == "What happens?"


def test_a_hundred_thousand_markers():
    assert without_markers("so <image 1> " * 100_000, images=1).count("the image") == 100_000
    for text in ("<image " * 100_000, "<|image_" * 100_000):
        assert without_markers(text, images=1) == text.strip()


def test_rows(tmp_path):
    processor = Processor.load(make_processor_folder(tmp_path / "model"))
    pictures = [picture(1), picture(2)]
    two = encode(GOOD | {"images": pictures, "problem": "Is <image> like <image>?"}, processor, max_images=2)
    assert (two.bad_reason, two.problem) == (None, "Is image 1 like image 2?")
    bad = encode(GOOD | {"images": pictures[:1], "problem": "Is <image> like <image>?"}, processor)
    assert bad.bad_reason == "image_markers" and "2 <image>, the row 1 image" in bad.bad_detail
