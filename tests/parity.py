"""A torch model and ours with the same weights, and how far apart they are. For tests only."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
import torch_models as tm

from vigos_jax.method.batch import PromptBatch
from vigos_jax.method.packing import Buckets, pack_prompts
from vigos_jax.method.rows import Row
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.rollouts.sampler import Sampler, row_keys
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.weights import reading

NOTICEABLE = 1000 * tm.TOLERANCE  # a broken feature must show at least this much


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """`run` is (variables, vision, text) -> (visual tokens, logits)."""

    torch: torch.nn.Module
    config: ModelConfig
    model: VisionLanguageModel
    base: Any
    run: Any


def make_run(model: VisionLanguageModel):
    @jax.jit
    def run(variables, vision, text):
        images = model.apply(variables, vision, method="encode_images")
        hidden, _ = model.apply(variables, text, images)
        return images, model.apply(variables, hidden, method="logits")

    return run


def make_pair(reference: torch.nn.Module, folder: pathlib.Path) -> Pair:
    """Ours is loaded from what the torch model saves into the folder."""
    return load_pair(reference, tm.save(reference, folder))


def load_pair(reference: torch.nn.Module, folder: pathlib.Path) -> Pair:
    """Ours is loaded from the folder."""
    config = reading.load_config(folder)
    model = VisionLanguageModel(config)
    base = reading.load_params(folder, config, abstract_variables(model)["params"], dtype=np.float32)
    return Pair(reference, config, model, base, make_run(model))


def pack(samples: Sequence[tm.Sample], config: ModelConfig, *, length: int, slots: int = 448) -> PromptBatch:
    """The samples as prompts of one length."""
    buckets = Buckets(patches=(64, slots), prompt=(length,), completion=(1,), sequence=(1,))
    return pack_prompts([Row(s.images, s.turn) for s in samples], config=config, buckets=buckets)


def worst(ours: np.ndarray, theirs: Sequence[np.ndarray]) -> list[float]:
    """Largest difference of each row, at any position; rows of ours are padded at their end."""
    rows = zip(np.asarray(ours), theirs, strict=True)
    return [tm.max_difference(a[: len(b)], b) for a, b in rows]


class Reference:
    """What torch models give for samples, each run alone and without padding."""

    def __init__(self, samples: Mapping[str, tm.Sample], model: Callable[[str], torch.nn.Module]):
        """model: by head, always the same one."""
        self.samples, self.model = samples, model
        self.outputs = functools.cache(self._outputs)

    def _outputs(self, head: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(visual tokens, logits) by sample."""
        none, model = np.zeros((0, 0), np.float32), self.model(head)
        return {
            name: (tm.torch_images(model, s) if s.images else none, tm.torch_logits(model, [s])[0])
            for name, s in self.samples.items()
        }

    def worst_logits(self, logits: np.ndarray, head: str) -> dict[str, float]:
        expected = [logits for _, logits in self.outputs(head).values()]
        return dict(zip(self.samples, worst(logits, expected), strict=True))

    def worst_features(self, images: np.ndarray, head: str) -> dict[str, float]:
        """Of the samples with images."""
        rows = [i for i, s in enumerate(self.samples.values()) if s.images]
        names = [list(self.samples)[i] for i in rows]
        expected = [self.outputs(head)[name][0] for name in names]
        return dict(zip(names, worst(np.asarray(images)[rows], expected), strict=True))

    def check(self, pair: Pair, batch: PromptBatch, head: str) -> np.ndarray:
        """Visual tokens, which are returned, and logits of every sample in one padded batch."""
        for features, logits in self.outputs(head).values():
            assert logits.std() >= 1 and (not features.size or features.std() >= 0.5)  # flat ones agree with anything
        images, logits = pair.run({"params": pair.base}, batch.vision, batch.text)
        assert max(self.worst_features(images, head).values()) <= tm.TOLERANCE
        assert max(self.worst_logits(logits, head).values()) <= tm.TOLERANCE
        assert np.isfinite(images).all() and np.isfinite(logits).all()
        return images

    def check_greedy_tokens(self, pair: Pair, batch: PromptBatch, head: str) -> None:
        """Prefill, then token by token."""
        new_tokens, eos = 12, tm.VOCAB - 1
        sampler = Sampler(pair.model, Sampling(max_tokens=new_tokens, temperature=0.0), eos_ids=[eos])
        out = sampler({"params": pair.base}, batch, row_keys(0, 0, len(self.samples)))
        for ids, (name, s) in zip(out.ids, self.samples.items(), strict=True):
            options = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": eos, "pad_token_id": 0}
            expected = self.model(head).generate(**s.torch_inputs(), **options)[0, len(s.ids) :].tolist()
            assert list(ids) == expected, name


def check_packed_row(pair: Pair) -> None:
    """A prefix with an image and two branches in one sequence give the logits of prefix + branch, each by itself."""
    rng, family = np.random.default_rng(5), pair.config.family
    prefix = tm.make_sample([3, tm.TALL], seed=6, family=family)
    first, second = tm.text_ids(9, rng), tm.text_ids(6, rng)
    a, b = (tm.Sample(prefix.ids + branch, prefix.images) for branch in (first, second))
    both = tm.Sample(prefix.ids + first + second, prefix.images)
    rows = pack([both, a, b, both], pair.config, length=80)
    p, n, m = len(prefix.ids), len(first), len(second)
    positions, segments = np.array(rows.text.positions), np.array(rows.text.segment_ids)
    positions[[0, 3], :, p + n : p + n + m] = positions[
        2, :, p : p + m
    ]  # the second branch continues the prefix, not the first branch
    segments[0, p : p + n + m] = [2] * n + [3] * m
    text = rows.text.replace(positions=positions, segment_ids=segments)
    _, logits = pair.run({"params": pair.base}, rows.vision, text)
    packed, alone_a, alone_b, unmasked = (np.asarray(x) for x in logits)

    for sample, alone in ((a, alone_a), (b, alone_b)):
        expected = tm.torch_logits(pair.torch, [sample])[0]
        assert tm.max_difference(alone[: len(sample.ids)], expected) <= tm.TOLERANCE
    assert tm.max_difference(packed[:p], alone_b[:p]) <= 2e-5
    assert tm.max_difference(packed[p : p + n], alone_a[p : p + n]) <= 2e-5
    assert tm.max_difference(packed[p + n : p + n + m], alone_b[p : p + m]) <= 2e-5
    # The same positions without the branches' mask: the first branch leaks into the second.
    assert tm.max_difference(unmasked[p + n : p + n + m], alone_b[p : p + m]) > NOTICEABLE
