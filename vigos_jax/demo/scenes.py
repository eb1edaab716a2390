"""What the demo's images show: things, how they are drawn, and the descriptions that name them.

Twelve kinds of thing stand on a 3x3 grid of cells in an 84x84 image. Each kind has a *prior* color, size
and count (bananas are yellow, large, two).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

CELL, GRID = 28, 3  # pixels per cell, cells per side
SIDE = CELL * GRID
ATTRIBUTES = {  # attribute -> its values; a description names them in the order count, size, color
    "count": ("one", "two", "three"),
    "size": ("small", "large"),
    "color": ("red", "orange", "yellow", "green", "blue", "purple", "white", "black"),
}
RGB = {
    "red": (214, 40, 40), "orange": (245, 138, 20), "yellow": (246, 226, 50), "green": (48, 160, 60),
    "blue": (45, 90, 220), "purple": (150, 55, 180), "white": (248, 248, 248), "black": (18, 18, 18),
}  # fmt: skip
RADIUS = {"small": 6.5, "large": 11.5}  # pixels


@dataclass(frozen=True)
class Thing:
    """One kind of thing in an image. All of its pieces share color and size; `count` is a word."""

    kind: str
    count: str
    size: str
    color: str

    def replace(self, attribute: str, value: str) -> "Thing":
        """The same thing with another value of one attribute; ValueError if there is no such value."""
        if value not in ATTRIBUTES[attribute]:
            raise ValueError(f"{value!r} is not a {attribute}; choices: {ATTRIBUTES[attribute]}")
        return Thing(**{**self.__dict__, attribute: value})


PRIORS = {
    thing.kind: thing
    for thing in (
        Thing("bananas", "two", "large", "yellow"),
        Thing("bricks", "three", "large", "red"),
        Thing("carrots", "two", "small", "orange"),
        Thing("clouds", "two", "large", "white"),
        Thing("drops", "three", "small", "blue"),
        Thing("grapes", "three", "small", "purple"),
        Thing("leaves", "three", "small", "green"),
        Thing("stars", "one", "small", "yellow"),
        Thing("tires", "two", "large", "black"),
        Thing("tomatoes", "one", "small", "red"),
        Thing("trees", "one", "large", "green"),
        Thing("whales", "one", "large", "blue"),
    )
}
KINDS = tuple(PRIORS)  # alphabetical


@dataclass(frozen=True)
class Scene:
    """What an image shows.

    Attributes:
      things: in alphabetical order of their kinds.
      cells: [9], row-major: which of the things stands in each cell, -1 for none.
    """

    things: tuple[Thing, ...]
    cells: tuple[int, ...]

    def cell_labels(self) -> np.ndarray:
        """int32 [9, 3]: kind (0 is empty, else 1 + index), color, size (both -1 in empty cells)."""
        rows = []
        for cell in self.cells:
            thing = self.things[cell]
            rows.append((0, -1, -1) if cell < 0 else (
                1 + KINDS.index(thing.kind), ATTRIBUTES["color"].index(thing.color),
                ATTRIBUTES["size"].index(thing.size)))  # fmt: skip
        return np.asarray(rows, np.int32)  # [9, 3]


# Drawing ------------------------------------------------------------------------------------------


def _star() -> list[float]:
    turns = [(math.pi * (k / 5 - 0.5), 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
    return [c for angle, r in turns for c in (r * math.cos(angle), r * math.sin(angle))]


# Shapes in the unit square [-1, 1]^2, y down: strokes of (is_ellipse, coordinates, is_ink), later ones on top.
_SHAPES = {
    "bananas": [(True, [-1, -1, 1, 1], True), (True, [-0.7, -1.45, 1.3, 0.55], False)],
    "bricks": [(False, [-1, -0.55, 1, -0.55, 1, 0.55, -1, 0.55], True)],
    "carrots": [(False, [-0.5, -1, 0.5, -1, 0, 1], True)],
    "clouds": [
        (True, [-1, -0.3, 0, 0.7], True), (True, [-0.6, -0.9, 0.5, 0.4], True), (True, [0, -0.3, 1, 0.7], True),
    ],
    "drops": [(False, [0, -1, 0.55, 0.25, -0.55, 0.25], True), (True, [-0.65, -0.3, 0.65, 1], True)],
    "grapes": [
        (True, [x - 0.46, y - 0.46, x + 0.46, y + 0.46], True) for x in (-0.54, 0.54) for y in (-0.54, 0.54)
    ],
    "leaves": [(False, [-1, 1, -0.95, -0.1, -0.1, -0.95, 1, -1, 0.95, 0.1, 0.1, 0.95], True)],
    "stars": [(False, _star(), True)],
    "tires": [(True, [-1, -1, 1, 1], True), (True, [-0.5, -0.5, 0.5, 0.5], False)],
    "tomatoes": [(True, [-0.9, -0.9, 0.9, 0.9], True)],
    "trees": [
        (False, [0, -1, 0.9, 0.35, -0.9, 0.35], True), (False, [-0.2, 0.3, 0.2, 0.3, 0.2, 1, -0.2, 1], True),
    ],
    "whales": [(True, [-1, -0.55, 0.5, 0.6], True), (False, [0.2, 0.1, 1, -0.75, 1, 0.75], True)],
}  # fmt: skip


@functools.cache
def _mask(kind: str, size: str, dx: int, dy: int) -> np.ndarray:
    """Coverage float32 [28, 28] in 0..1 of one piece, (dx, dy) half pixels off its cell's center."""
    scale = 4  # drawn 4x larger, then averaged: anti-aliased edges
    canvas = Image.new("L", (CELL * scale, CELL * scale), 0)
    draw = ImageDraw.Draw(canvas)
    center = np.array([CELL / 2 + dx / 2, CELL / 2 + dy / 2])
    for is_ellipse, unit, is_ink in _SHAPES[kind]:
        points = (center + RADIUS[size] * np.asarray(unit, float).reshape(-1, 2)) * scale
        (draw.ellipse if is_ellipse else draw.polygon)(points.reshape(-1).tolist(), fill=255 if is_ink else 0)
    return np.asarray(canvas.reduce(scale), np.float32) / 255.0


def render(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """Draws a scene: uint8 [84, 84, 3]. Position, brightness, background and pixel noise come from `rng`."""
    image = np.full((SIDE, SIDE, 3), rng.uniform(110, 145), np.float32)
    shifts = rng.integers(-4, 5, (GRID * GRID, 2))
    light = rng.uniform(0.82, 1.0, GRID * GRID)
    for index, cell in enumerate(scene.cells):
        if cell < 0:
            continue
        thing = scene.things[cell]
        mask = _mask(thing.kind, thing.size, *shifts[index].tolist())[..., None]
        y, x = CELL * (index // GRID), CELL * (index % GRID)
        ink = np.asarray(RGB[thing.color], np.float32) * light[index]
        image[y : y + CELL, x : x + CELL] += mask * (ink - image[y : y + CELL, x : x + CELL])
    image += rng.integers(-10, 11, image.shape, dtype=np.int8)
    return np.clip(image, 0, 255).astype(np.uint8)


def blank_image() -> np.ndarray:
    """The control: an image that shows nothing, uint8 [84, 84, 3]."""
    return np.full((SIDE, SIDE, 3), 128, np.uint8)


# Descriptions, and the judges that read them ------------------------------------------------------


def describe(things: Sequence[Thing]) -> str:
    """The one faithful description: `bananas : two small blue, trees : one large green`."""
    return ", ".join(f"{t.kind} : {t.count} {t.size} {t.color}" for t in sorted(things, key=lambda t: t.kind))


def description_states(description_text: str, kind: str, attribute: str) -> str | None:
    """The value a description gives `attribute` of `kind`; None if it gives none, or two different ones."""
    stated = set()
    for part in description_text.split(","):
        words = part.split()
        if words[:1] == [kind]:
            stated |= set(words[1:]) & set(ATTRIBUTES[attribute])
    return stated.pop() if len(stated) == 1 else None


def is_description_correct(description_text: str, scene: Scene) -> bool:
    """Whether a description says exactly what the scene shows (white space aside)."""
    return description_text.split() == describe(scene.things).split()
