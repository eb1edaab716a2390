"""Tokenizer and image processor of a model folder: text to token ids, images to patches, chat turns.

Both come from transformers and need neither torch nor torchvision. User text never becomes a control token:
`<|im_end|>` in a problem is tokenised letter by letter, so data cannot close a turn or add an image.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import tokenizers
from PIL import Image

from vigos_jax.data.chat_templates import ChatTemplate, open_chat_template
from vigos_jax.data.images import BadImage, upright_rgb
from vigos_jax.data.tokenizer_files import (
    build,
    check_ids,
    end_and_pad,
    image_settings,
    open_image_processor,
    open_tokenizer,
    text_tokenizer,
    token_table,
)
from vigos_jax.errors import InputError
from vigos_jax.models.config import ModelConfig
from vigos_jax.runtime.paths import absolute

MAX_ASPECT_RATIO = 200  # the image processor's own limit
_PROBE_TOKENS = 2**17  # visual tokens that the image which checks a folder's settings may take
TEXT_MARK = "@@vigos-user-text@@"  # where the user's text goes in a rendered chat

Grid = tuple[int, int, int]  # (t, h, w) in patches


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image, or frames of a video, cut into patches in the tower's order: those of a visual token together.

    Attributes:
      patches: float32 [P, patch_dim], P = t * h * w.
      grid: (t, h, w).
      label: None for an image; for frames of a video, the text in front of them: a timestamp, or nothing.
      time_step: of frames, M-RoPE positions from one to the next.
      continues: whether these are further frames of the video in front of them.
    """

    patches: np.ndarray
    grid: Grid
    label: str | None = None
    time_step: float = 1.0
    continues: bool = False


@dataclasses.dataclass(frozen=True)
class PixelLimits:
    """How many pixels an image may be resized to.

    Attributes:
      least, most: 0 for what the model folder says.
    """

    least: int = 0
    most: int = 0


AS_THE_FOLDER = PixelLimits()


@dataclasses.dataclass(frozen=True)
class Turn:
    """A prompt in two parts; prompt = prefix_ids + rest_ids.

    The split lies after the last image, so all roles of a sample share `prefix_ids`; without an image,
    after the last control token before the text.
    """

    prefix_ids: tuple[int, ...]  # system header .. last <|vision_end|>; one image pad per visual token
    rest_ids: tuple[int, ...]  # user text, end of turn, assistant header, assistant prefill

    @property
    def ids(self) -> tuple[int, ...]:
        """The whole prompt."""
        return self.prefix_ids + self.rest_ids


@dataclasses.dataclass(frozen=True, eq=False)
class Processor:
    """The tokenizer, chat template and image processor of a model folder. Build it with `Processor.load`.

    Thread-safe. It pickles as the arguments of `load`; the receiving process loads it once.
    """

    folder: str
    chat_template_kwargs: Mapping[str, Any]  # the user's switches of the chat template
    tokenizer: Any  # transformers' tokenizer
    image_token_id: int
    video_token_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    patch_size: int  # pixels
    merge_size: int  # patches along a side of one visual token
    frames_per_patch: int  # of a video
    tokens_per_second: float  # M-RoPE positions per second of video; 0 if timestamps mark its frames instead
    wraps_videos: bool  # the template's pair of vision tokens stands around all frames of a video
    _image_processor: Any
    _text_tokenizer: tokenizers.Tokenizer  # a private copy in which control tokens are plain text
    _control_ids: dict[str, int]
    _chat_template: ChatTemplate
    _bytes_of: dict[int, bytes]

    @classmethod
    def load(
        cls, folder: str | pathlib.Path, *, chat_template_kwargs: Mapping[str, Any] = MappingProxyType({})
    ) -> "Processor":
        """Reads tokenizer, chat template and image settings from a local Hugging Face folder.

        Args:
          chat_template_kwargs: switches of the folder's chat template, like enable_thinking.

        Raises:
          InputError: a file is missing or broken (it is named), or the files contradict each other.
        """
        root = pathlib.Path(absolute(folder))
        model = ModelConfig.load(root)
        tokenizer = open_tokenizer(root)
        image_processor = open_image_processor(root, model)
        plain, added = build(root / "tokenizer.json", lambda: text_tokenizer(tokenizer))
        control_ids = {token: index for token, (index, is_control) in added.items() if is_control}
        template = open_chat_template(root, tokenizer, chat_template_kwargs)
        turn_end = template.turn_end(control_ids)
        eos_ids, pad_id = end_and_pad(root, tokenizer, control_ids.get(turn_end) if turn_end else None)
        vocabulary, control = tokenizer.get_vocab(), set(control_ids.values())
        check_ids(root, model, vocabulary=vocabulary, control=control, ends=[*eos_ids, pad_id])
        processor = cls(
            folder=str(root),
            chat_template_kwargs=dict(chat_template_kwargs),
            tokenizer=tokenizer,
            image_token_id=model.image_token_id,
            video_token_id=model.video_token_id,
            eos_ids=eos_ids,
            pad_id=pad_id,
            patch_size=model.vision.patch_size,
            merge_size=model.vision.spatial_merge_size,
            frames_per_patch=model.vision.temporal_patch_size,
            tokens_per_second=model.vision.tokens_per_second,
            wraps_videos=model.wraps_videos,
            _image_processor=image_processor,
            _text_tokenizer=plain,
            _control_ids=control_ids,
            _chat_template=template,
            _bytes_of=token_table(root / "tokenizer.json", tokenizer, added),
        )
        build(image_settings(root)[0], lambda: _probe(processor))
        return processor

    def __reduce__(self):
        return _load_once, (self.folder, tuple(self.chat_template_kwargs.items()))

    @property
    def visual_ids(self) -> tuple[int, int]:
        """The tokens that stand for pieces of images and of videos."""
        return self.image_token_id, self.video_token_id

    @property
    def normalization(self) -> tuple[np.ndarray, np.ndarray, float]:
        """(mean [3], std [3], scale) of patches: (scale * pixel - mean) / std."""
        p = self._image_processor
        return np.asarray(p.image_mean, np.float32), np.asarray(p.image_std, np.float32), float(p.rescale_factor)

    @property
    def merge_unit(self) -> int:
        """Pixels along a side of one visual token."""
        return self.patch_size * self.merge_size

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text: control tokens are text in it, other added ones (`<tool_call>`) are not."""
        return self._text_tokenizer.encode(text, add_special_tokens=False).ids

    def token_bytes(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token; added tokens give their name, ids the tokenizer lacks give b""."""
        return [self._bytes_of.get(int(i), b"") for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `token_bytes`; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(ids)).decode("utf-8", errors="replace")

    def limits(self, wanted: PixelLimits = AS_THE_FOLDER) -> PixelLimits:
        """The wanted limits, with zeros replaced by the folder's, which are clamped to the user's other limit."""
        size = self._image_processor.size
        least, most = wanted.least or size["shortest_edge"], wanted.most or max(size["longest_edge"], wanted.least)
        return PixelLimits(min(least, wanted.most) if wanted.most else least, most)

    def image_layout(self, width: int, height: int, wanted: PixelLimits = AS_THE_FOLDER) -> EncodedImage:
        """What `encode_image` gives for an image of so many pixels, without its patches; BadImage as there."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        short, long = sorted((width, height))
        if short < 1 or long > MAX_ASPECT_RATIO * short:
            size = f"{width} x {height} pixels"
            raise BadImage("image_too_narrow", f"{size}; a side may be {MAX_ASPECT_RATIO} times the other")
        limits = self.limits(wanted)
        sides = smart_resize(height, width, self.merge_unit, min_pixels=limits.least, max_pixels=limits.most)
        h, w = (side // self.patch_size for side in sides)
        return EncodedImage(np.zeros((0, 0), np.float32), (1, h, w))

    def encode_image(self, image: Image.Image, wanted: PixelLimits = AS_THE_FOLDER) -> EncodedImage:
        """Turns upright, lays on white, resizes, normalises and cuts an image into patches.

        However small it is, it is enlarged to the least number of pixels. Raises BadImage ("image_too_narrow") if
        one side is more than MAX_ASPECT_RATIO times the other, or zero.
        """
        image = upright_rgb(image)
        grid = self.image_layout(*image.size, wanted).grid
        limits = self.limits(wanted)
        # The layout is named because an image of 1 to 4 pixels' height could be taken for channels.
        out = self._image_processor(
            images=image,
            return_tensors="np",
            input_data_format="channels_last",
            size={"shortest_edge": limits.least, "longest_edge": limits.most},
        )
        if tuple(out["image_grid_thw"][0].tolist()) != grid:
            raise ValueError(f"the image processor cuts {image.size} into {out['image_grid_thw'][0]}, not {grid}")
        return EncodedImage(patches=np.asarray(out["pixel_values"], np.float32), grid=grid)

    def video_layout(
        self, sizes: Sequence[tuple[int, int]], *, fps: float, wanted: PixelLimits = AS_THE_FOLDER
    ) -> tuple[EncodedImage, ...]:
        """What `encode_video` gives for frames of these sizes (width, height), without patches; BadImage as there."""
        if not sizes or len(set(sizes)) > 1 or not 0 < fps < float("inf"):
            shown = ", ".join(f"{w} x {h}" for w, h in sorted(set(sizes))) or "no size"
            what = f"{len(sizes)} frame(s) of {shown} at {fps} a second"
            raise BadImage("bad_video", f"{what}; a video needs frames of one size, and fps above 0")
        one = self.image_layout(*sizes[0], wanted)
        _, h, w = one.grid
        n = self.frames_per_patch
        groups = -(-len(sizes) // n)
        if self.tokens_per_second:
            return (EncodedImage(one.patches, (groups, h, w), "", self.tokens_per_second * n / fps),)
        last = (len(sizes) - 1) / fps  # also the time of frames that lack for a pair
        times = [(min(i * n / fps, last) + min((i * n + n - 1) / fps, last)) / 2 for i in range(groups)]
        return tuple(
            EncodedImage(one.patches, (1, h, w), f"<{time:.1f} seconds>", continues=i > 0)
            for i, time in enumerate(times)
        )

    def encode_video(
        self, frames: Sequence[Image.Image], *, fps: float, wanted: PixelLimits = AS_THE_FOLDER
    ) -> tuple[EncodedImage, ...]:
        """Encodes a video's frames in groups of `frames_per_patch`; the last frame is repeated to fill its group.

        Qwen2.5-VL reads one block whose M-RoPE positions encode time, the other models one block per group, each after
        a timestamp. The limits apply to each frame, as to an image.

        Args:
          fps: frames per second of these frames (not of the file they were taken from).

        Raises:
          BadImage: "bad_video" if there are none, their sizes differ or fps is not positive; else as `encode_image`.
        """
        layout = self.video_layout([f.size for f in frames], fps=fps, wanted=wanted)
        n = self.frames_per_patch
        encoded = [self.encode_image(frame, wanted) for frame in frames]
        encoded += encoded[-1:] * (-len(frames) % n)
        # An image's patch [C, n, p, p] shows the one frame n times: take the i-th time from the i-th frame.
        split = [e.patches.reshape(len(e.patches), -1, n, self.patch_size**2) for e in encoded]
        pairs = [
            np.stack([split[first + i][:, :, i] for i in range(n)], 2).reshape(encoded[0].patches.shape)
            for first in range(0, len(encoded), n)
        ]
        if self.tokens_per_second:
            pairs = [np.concatenate(pairs)]
        return tuple(dataclasses.replace(part, patches=p) for part, p in zip(layout, pairs, strict=True))

    def visual_tokens(self, width: int, height: int, wanted: PixelLimits = AS_THE_FOLDER) -> int:
        """Visual tokens of an image of so many pixels, without making it; BadImage as `encode_image`."""
        _, h, w = self.image_layout(width, height, wanted).grid
        return h * w // self.merge_size**2

    @functools.cached_property
    def behind_header(self) -> str:
        """What the chat template puts after the assistant's header, in front of every answer."""
        return self._chat_template.behind_header()

    @property
    def template_switches(self) -> Mapping[str, Any]:
        """The switches that the chat template is rendered with: the user's, and enable_thinking=False if it has it."""
        return self._chat_template.switches

    def encode_turn(
        self,
        *,
        user_text: str,
        grids: Sequence[Grid],
        assistant_prefill: str,
        labels: Sequence[str | None] = (),
        continues: Sequence[bool] = (),
    ) -> Turn:
        """Prompt of one user turn: the images, then the text; then the assistant's header and prefill.

        Args:
          user_text: exactly the text after the images; may be empty.
          grids: one per image, from `EncodedImage.grid`.
          labels: one per image, from `EncodedImage.label`; () if all are images.
          continues: one per image, from `EncodedImage.continues`; () if every frame is a video of its own.
          assistant_prefill: forced start of the answer, tokenised by itself; may be empty.

        Raises:
          InputError: the chat template does not put the images first and the text after them, once; or it opens a
            thought in front of the prefill.
        """
        self._chat_template.check_prefill(self.behind_header, assistant_prefill)
        labels = tuple(labels) or (None,) * len(grids)
        continues = tuple(continues) if continues and self.wraps_videos else (False,) * len(grids)
        head, before, after, tail = self._chat_parts(labels, continues)
        counts = iter(t * h * w // self.merge_size**2 for t, h, w in grids)
        prefix: list[int] = []
        for token in head:
            prefix += [token] * next(counts) if token in self.visual_ids else [token]
        rest = self.encode_text(before + user_text + after) + tail + self.encode_text(assistant_prefill)
        return Turn(prefix_ids=tuple(prefix), rest_ids=tuple(rest))

    @functools.lru_cache(maxsize=64)  # noqa: B019  (processors live as long as the program)
    def _chat_parts(
        self, labels: tuple[str | None, ...], continues: tuple[bool, ...]
    ) -> tuple[list[int], str, str, list[int]]:
        """The model's own template around the text: (ids, template text before, template text after, ids).

        Template text that touches the user's is tokenised together with it, the way the model was trained; so is a
        label with what stands before it.
        """
        visuals: list[list[str | None]] = []  # labels of an image, or of a video's frames
        for label, goes_on in zip(labels, continues, strict=True):
            visuals = [*visuals[:-1], [*visuals[-1], label]] if goes_on else [*visuals, [label]]
        content = [{"type": "image" if one[0] is None else "video"} for one in visuals]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": TEXT_MARK}]}]
        chat = self._chat_template.render(messages, add_generation_prompt=True)
        pattern = "(" + "|".join(re.escape(t) for t in sorted(self._control_ids, key=len, reverse=True)) + ")"
        pieces = re.split(pattern, chat)  # text, control token, text, control token, ...
        marked = [i for i, piece in enumerate(pieces) if TEXT_MARK in piece]
        if len(marked) != 1 or pieces[marked[0]].count(TEXT_MARK) != 1:
            raise InputError(f"the chat template of {self.folder} must show the user's text once, unchanged")
        before, after = pieces[marked[0]].split(TEXT_MARK)
        first, last = pieces[: marked[0]], pieces[marked[0] + 1 :]
        wanted = [self.visual_ids[one[0] is not None] for one in visuals]
        places = [i for i, piece in enumerate(first) if self._control_ids.get(piece) in self.visual_ids]
        others = [piece for piece in last if self._control_ids.get(piece) in self.visual_ids]
        if others or [self._control_ids[first[i]] for i in places] != wanted:
            raise InputError(
                f"the chat template of {self.folder} must show one image token per image, before the text, "
                "and one video token per video"
            )
        for place, one in reversed([*zip(places, visuals, strict=True)]):
            start, end = place - 2, place + 2  # <|vision_start|> and <|vision_end|>
            if self.wraps_videos and one[0] is not None:
                block = first[start : end + 1]
                first[place : place + 1] = [piece for label in one for piece in (label or "", *block)]
            else:
                first[start - 1] += one[0] or ""
        return self._template_ids(first), before, after, self._template_ids(last)

    def _template_ids(self, pieces: Sequence[str]) -> list[int]:
        """Ids of template text that was split at its control tokens."""
        ids: list[int] = []
        for piece in pieces:
            ids += [self._control_ids[piece]] if piece in self._control_ids else self.encode_text(piece)
        return ids


@functools.lru_cache(maxsize=4)
def _load_once(folder: str, chat_template_kwargs: tuple[tuple[str, Any], ...]) -> Processor:
    return Processor.load(folder, chat_template_kwargs=dict(chat_template_kwargs))


def _probe(processor: Processor) -> None:
    """Encodes a test image, so that unusable settings of a folder fail before a run begins."""
    ramp = np.linspace(0, 255, 90 * 60 * 3).reshape(60, 90, 3).astype(np.uint8)
    if (tokens := processor.visual_tokens(90, 60)) > _PROBE_TOKENS:
        raise ValueError(f"an image of 90 x 60 pixels would take {tokens} visual tokens, more than {_PROBE_TOKENS}")
    patches = processor.encode_image(Image.fromarray(ramp)).patches
    if not (np.ptp(patches, axis=0).min() > 1e-3 and np.abs(patches).max() < 100):  # NaN is neither
        raise ValueError("its mean, std and scale turn a ramp of grey into numbers that are equal, too large or none")
