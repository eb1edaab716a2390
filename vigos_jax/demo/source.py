"""A world of the demo as a source of rows, with its own probes and its measure of a leaky description.

It has the interface of `data.sources.Source`, but does not import it: this package is a leaf.
"""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from vigos_jax.demo import world as worlds
from vigos_jax.demo.scenes import blank_image


class DemoSource(Sequence):
    """Random access to rows `{"id", "problem", "answer", "images": [PIL image], "options"}`, all answers true.

    Args:
      world: one of `world.WORLDS`.
      length: number of rows; row `i` is `world.item(seed, i, setting=setting, world=world)`.
      blank: the control run: every image is mid-grey, questions and references stay.
    """

    image_roots = ()
    has_own_evaluation = True

    def __init__(
        self, world: str = "demo", *, length: int = 100_000, seed: int = 0, blank: bool = False, setting: str = "train"
    ):
        if length < 1 or seed < 0:
            raise ValueError(f"demo length {length} must be at least 1 and seed {seed} at least 0")
        self.world, self.length, self.seed, self.blank, self.setting = world, length, seed, blank, setting

    def __repr__(self) -> str:  # grain prints its source; also a fingerprint of what the rows are
        world = "" if self.world == "demo" else f"{self.world!r}, "  # as earlier runs recorded it
        return (
            f"DemoSource({world}length={self.length}, seed={self.seed}, blank={self.blank}, setting={self.setting!r})"
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(f"row {index} of {self.length}")
        row = worlds.item(self.seed, int(index), setting=self.setting, world=self.world)
        image = Image.fromarray(blank_image()) if self.blank else row.pil_image
        options = list(row.asks.choices)
        return {"id": row.id, "problem": row.question, "answer": row.answer, "images": [image], "options": options}

    def probes(self, *, count: int, seed: int) -> "DemoProbes":
        """Rows of the demo's evaluation, see `DemoProbes`."""
        return DemoProbes(self.world, seed=seed, length=count, blank=self.blank)

    def for_diagnosis(self, *, count: int, seed: int) -> "DemoSource":
        """Images that contradict the prior: if they agree with it, guessing and looking give the same answer."""
        return DemoSource(self.world, length=count, seed=seed, blank=self.blank, setting="conflict")


class DemoProbes(Sequence):
    """Rows of the demo's evaluation: images that contradict the prior and images that agree, alternating."""

    image_roots = ()

    def __init__(self, world: str, *, seed: int, length: int, blank: bool):
        self._world, self._seed, self._length = world, seed, length
        options = {"length": length, "seed": seed, "blank": blank}
        self._sources = [DemoSource(world, setting=setting, **options) for setting in ("conflict", "prior")]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        return self._sources[index % 2][index // 2]

    def item(self, i: int) -> worlds.Item:
        """Question i, conflict and prior images in turn."""
        return worlds.item(self._seed, i // 2, setting=("conflict", "prior")[i % 2], world=self._world)

    def is_leaky(self, i: int, description: str, answer: str | None) -> bool:
        """Whether the description of an image that contradicts the prior states the prior."""
        item = self.item(i)
        return item.is_conflict and worlds.description_states_prior(description, item)
