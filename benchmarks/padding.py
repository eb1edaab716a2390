"""Useful against processed tokens on a data set of mixed sizes, through the real grouping and buckets."""

import numpy as np

from benchmarks.harness import Result
from configs import base
from vigos_jax.data.loader import Order, _Batches

ROWS, BATCH, WINDOW, MICRO = 4096, 32, 32, 4


def _data():
    """Visual, question, description and reasoning tokens of each row: images from small to a megapixel and more."""
    rng = np.random.default_rng(0)
    visual = np.clip(rng.lognormal(np.log(500), 0.7, ROWS), 64, 4096).astype(int)
    question = np.clip(rng.lognormal(np.log(80), 0.6, ROWS), 16, 800).astype(int)
    description = np.clip(rng.lognormal(np.log(120), 0.35, ROWS), 30, 400).astype(int)
    reasoning = np.clip(rng.lognormal(np.log(180), 0.5, ROWS), 30, 1200).astype(int)
    return visual, question, description, reasoning


def _fit(sizes, n):
    return next(s for s in sizes if n <= s)


def _shares(window: int, micro: int) -> dict[str, float]:
    visual, question, description, reasoning = _data()
    order = np.random.default_rng(1).permutation(ROWS)
    batches = _Batches(order, Order(BATCH, seed=0, window=window), size_of=lambda i: visual[i] + question[i])
    buckets = base.get_config().buckets
    header, fixed = 20, 60  # chat header; instructions of a prompt
    useful, processed = {}, {}

    def count(name, lengths, sizes, groups=1):
        for part in np.split(np.asarray(lengths), groups):
            useful[name] = useful.get(name, 0) + int(np.sum(part))
            processed[name] = processed.get(name, 0) + len(part) * _fit(sizes, int(np.max(part)))

    for i in range(ROWS // BATCH):
        rows = batches[i]
        v, q, d, r = (x[rows] for x in (visual, question, description, reasoning))
        prompt = header + v + fixed + q
        count("patches", 4 * v, buckets.patches)
        count("prompts", prompt, buckets.prompt)
        student, teachers = prompt + d + r, header + v + 10 + d + fixed + q + d + r
        order_of = np.argsort(student, kind="stable") if micro > 1 else np.arange(BATCH)  # as `length_groups`
        count("student", student[order_of], buckets.sequence, micro)
        count("teachers", teachers[order_of], buckets.sequence, micro)
    shares = {name: useful[name] / processed[name] for name in useful}
    tokens = ("student", "teachers")  # where the time goes
    return shares | {"all": sum(useful[n] for n in tokens) / sum(processed[n] for n in tokens)}


def padding() -> Result:
    grouped, plain = _shares(WINDOW, MICRO), _shares(1, 1)
    say = lambda x: ", ".join(f"{name} {share:.2f}" for name, share in x.items())  # noqa: E731
    detail = (
        (f"rows grouped in windows of {WINDOW} batches, {MICRO} micro-batches by length", say(grouped)),
        ("the order left as it is", say(plain)),
    )
    what = f"useful / processed tokens of student and teachers, {ROWS} rows of mixed sizes, B = {BATCH}"
    # Buckets a fifth apart lose a tenth where lengths are spread evenly, so 0.9 is the most for equal rows in a batch.
    return Result("padding", what, grouped["all"], 0.83, None, detail)
