"""The objective the slow way: one sample, one role, one whole sequence at a time, all logits, float64.

Nothing is packed, chunked or shared between roles. Of the package only the model is used, with the containers it
takes its arguments in.
"""

import functools
import itertools

import jax
import numpy as np

from vigos_jax.models.inputs import TextInputs, VisionInputs

LENGTH = 72  # all sequences are padded to it on the right: one compiled program


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, variables, vision, text):
    hidden, _ = model.apply(variables, text, model.apply(variables, vision, method="encode_images"))
    return model.apply(variables, hidden, method="logits")[0]


def logits(model, variables, images, ids):
    """[T, V] logits of one sequence; the pictures take the first image tokens."""
    c = model.config
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(ids)] = ids
    positions = np.zeros((1, 3, LENGTH), np.int32)
    positions[0, :, : len(ids)] = positions_of(ids, images, c)
    image_index = np.full((1, LENGTH), -1, np.int32)
    count = sum(len(i.patches) for i in images) // c.vision.merge_unit
    image_index[0, np.flatnonzero(np.array(ids) == c.image_token_id)[:count]] = np.arange(count)
    segments = (np.arange(LENGTH) < len(ids)).astype(np.int32)[None]
    text = TextInputs(ids=padded, positions=positions, segment_ids=segments, image_index=image_index)
    return _logits(model, variables, vision_inputs(images, c.vision), text)[: len(ids)]


def positions_of(ids, images, config):
    """[3, T] M-RoPE positions."""
    out, following, rest = [], 0, list(images)
    ids = list(ids)
    while len(out) < len(ids):
        if ids[len(out)] == config.image_token_id and rest:
            _, h, w = (n // config.vision.spatial_merge_size for n in rest.pop(0).grid)
            out += [(following, following + y, following + x) for y in range(h) for x in range(w)]
            following += max(h, w)
        else:
            out.append((following,) * 3)
            following += 1
    return np.array(out, np.int32).reshape(-1, 3).T


def vision_inputs(images, vision, slots=64):
    """The pictures of one sample, window by window."""
    merge, side = vision.spatial_merge_size, vision.window_side
    patches, ids = np.zeros((1, slots, vision.patch_dim), np.float32), np.zeros((1, slots), np.int32)
    hw, grid = np.zeros((1, slots, 2), np.int32), np.zeros((1, slots, 2), np.int32)
    token_unit = np.zeros((1, slots // merge**2), np.int32)
    slot, tokens = 0, 0
    for number, image in enumerate(images, start=1):
        rows, columns = image.grid[1] // merge, image.grid[2] // merge
        for top, left in itertools.product(range(0, rows, side), range(0, columns, side)):
            for y, x in itertools.product(range(top, top + side), range(left, left + side)):
                if y < rows and x < columns:
                    token_unit[0, tokens + y * columns + x] = slot // merge**2
                for dy, dx in itertools.product(range(merge), range(merge)):
                    if y < rows and x < columns:
                        patches[0, slot] = image.patches[((y * columns + x) * merge + dy) * merge + dx]
                        ids[0, slot], hw[0, slot] = number, (y * merge + dy, x * merge + dx)
                        grid[0, slot] = image.grid[1:]
                    slot += 1
        tokens += rows * columns
    return VisionInputs(patches=patches, image_ids=ids, hw=hw, grid=grid, token_unit=token_unit)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - np.max(x, -1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), -1, keepdims=True))


def divergence(role, p, q):
    """From log-probabilities [..., V] of student and teacher to [...], clipped per vocabulary entry if the role is."""
    if role.divergence == "forward_kl":
        terms = np.exp(q) * (q - p)
    elif role.divergence == "reverse_kl":
        terms = np.exp(p) * (p - q)
    else:
        m = np.log(role.beta * np.exp(q) + (1 - role.beta) * np.exp(p))
        terms = role.beta * np.exp(q) * (q - m) + (1 - role.beta) * np.exp(p) * (p - m)
    if role.clip and role.clip_per == "entry":
        terms = np.minimum(terms, role.clip)
    return np.sum(terms, -1)


def scored(role, rollout):
    """Completion positions that a role scores."""
    is_valid, n = rollout.spans.is_valid, len(rollout.ids)
    if role.when != "always" and (role.when == "valid") != is_valid:
        return []
    if not is_valid:
        return list(range(n))
    spans = [(0, n) if s == "completion" else getattr(rollout.spans, s) for s in role.scores]
    return [j for j in range(n) if any(start <= j < end for start, end in spans)]


def limits(role, n):
    """The clip of each of the `n` tokens that a role scores in a rollout."""
    out = np.full(n, role.clip if role.clip and role.clip_per == "token" else np.inf)
    for place, clip in ((0, role.first_clip), (-1, role.last_clip)):
        if clip:
            out[place] = min(out[place], clip)
    return out


def objective(
    model, base, trained, samples, roles, *, teacher_params=None, others=None, temperature=1.0, reduction="tokens"
):
    """The weighted sum of the roles' means over (row, rollout) pairs.

    Args:
      teacher_params: what lies over the base for the teachers; None for nothing.
      others: {role.model: (model, parameters)} of the roles that name one. All logits are cut to the fewest there are.
      temperature: divides all logits in the divergence.
      reduction: "tokens", or "sequences" for the mean of the rollouts' means.

    Returns:
      (loss, {role name: {"loss", "tokens", "clipped"}},
       {(sample, role name): (positions, kl, student_logp, teacher_logp, entropy of the student)}).
    """
    student = {"params": base} | trained
    models = {"": (model, {"params": base} | (teacher_params or {}))}
    models |= {name: (other, {"params": params}) for name, (other, params) in (others or {}).items()}
    width = min(m.config.vocab_size for m, _ in models.values())
    entries, clipped = {}, {}
    for i, (row, rollout) in enumerate(samples):
        if row.student is None or rollout is None:
            continue
        prompt = row.student.prefix_ids + row.student.rest_ids
        p = np.asarray(logits(model, student, row.images, prompt + rollout.ids))[len(prompt) - 1 :, :width]
        for role, turn in zip(roles, row.teachers, strict=True):
            at = np.array(scored(role, rollout), int)
            if not len(at):
                continue
            prompt = turn.prefix_ids + turn.rest_ids
            read = at if role.reads == "scored" else range(len(rollout.ids))
            ids = tuple(rollout.ids[j] for j in read)
            q = logits(*models[role.model], row.images_of(role.view), prompt + ids)
            q = np.asarray(q)[len(prompt) - 1 :, :width]
            q, p_at = q[np.arange(len(at)) if role.reads == "scored" else at], p[at]
            kl = divergence(role, log_softmax(p_at / temperature), log_softmax(q / temperature))
            log_p, log_q = log_softmax(p_at), log_softmax(q)
            token = np.arange(len(at)), np.array(rollout.ids)[at]
            entries[i, role.name] = (at, kl, log_p[token], log_q[token], -np.sum(np.exp(log_p) * log_p, -1))
            clipped[i, role.name] = np.minimum(kl, limits(role, len(at)))

    loss, parts = 0.0, {}
    for role in roles:
        values = [x for (_, name), x in clipped.items() if name == role.name]
        whole = [x[1] for (_, name), x in entries.items() if name == role.name]
        tokens = sum(len(x) for x in values)
        if reduction == "sequences":
            mean = sum(np.mean(x) for x in values) / max(len(values), 1)
        else:
            mean = sum(np.sum(x) for x in values) / max(tokens, 1)
        count = sum(np.sum(x > y) for x, y in zip(whole, values, strict=True))
        parts[role.name] = {"loss": mean, "tokens": tokens, "clipped": count}
        loss = loss + role.weight * mean
    return loss, parts, entries
