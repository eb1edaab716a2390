"""Privileged-answer leakage ratio (equations 7-10, A1-A7): the share of a correction that hangs on the answer shown.

On a fixed rollout, for a supervised token y_t with teacher q_t and student p_t,

    s_t   = |log q_t(y_t) - log p_t(y_t)|                      how strongly the token is corrected
    c^A_t = max(0, log q_t(y_t) - log q_wrong,t(y_t))          what the right answer adds over wrong ones
    c^I_t = max(0, log q_t(y_t) - log q_imgcf,t(y_t))          what the right image adds over another one
    PALR(G) = sum_G s c^A / (sum_G s (c^A + c^I) + eps)        over a group of tokens G

q_wrong is the uniform mixture of the same role shown each of K wrong answers, q_imgcf the same role shown the next
sample's image. c^A is 0 for a role that is shown no answer.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Groups of tokens, by the parts of the completion; T_y is every token, delimiters included.
GROUPS = {"T_d": ("description",), "T_ra": ("reasoning", "answer"), "T_y": ("completion",)}
EPS = 1e-8


@dataclasses.dataclass(frozen=True)
class TokenCorrections:
    """The supervised tokens of one rollout, once per token and teacher; arrays [n].

    Attributes:
      position: of the token in the completion.
      role: index into the role table.
      strength, answer, image: s, c^A and c^I.
    """

    position: np.ndarray
    role: np.ndarray
    strength: np.ndarray
    answer: np.ndarray
    image: np.ndarray


def mixture_logp(logps: np.ndarray, used: np.ndarray) -> np.ndarray:
    """log of the mean probability over the first axis. logps [K, ...]; used: bool [K], at least one true."""
    x = np.where(used.reshape(-1, *[1] * (logps.ndim - 1)), np.asarray(logps, np.float64), -np.inf)
    top = x.max(0)
    return top + np.log(np.exp(x - top).sum(0)) - np.log(used.sum())


def token_corrections(
    *,
    position: np.ndarray,
    role: np.ndarray,
    shows_reference: np.ndarray,
    student: np.ndarray,
    teacher: np.ndarray,
    wrong: np.ndarray,
    image: np.ndarray,
) -> TokenCorrections:
    """s, c^A and c^I from log-probabilities of the observed tokens, arrays [n].

    Args:
      shows_reference: bool, whether the token's role is shown the answer.
      student, teacher: log p and log q.
      wrong, image: log q_wrong and log q_imgcf.
    """
    gain = np.maximum(np.asarray(teacher, np.float64) - wrong, 0.0)
    return TokenCorrections(
        position=np.asarray(position),
        role=np.asarray(role),
        strength=np.abs(np.asarray(teacher, np.float64) - student),
        answer=np.where(shows_reference, gain, 0.0),
        image=np.maximum(np.asarray(teacher, np.float64) - image, 0.0),
    )


class Sums(NamedTuple):
    """Sums of s c^A, s c^I, s, c^A and c^I over a group of supervised tokens, and the number of tokens."""

    corrected_by_answer: float
    corrected_by_image: float
    strength: float
    answer: float
    image: float
    tokens: float


def group_sums(scores: TokenCorrections, is_in_group: np.ndarray) -> Sums:
    """The sums over the group's supervised tokens of one rollout.

    Args:
      is_in_group: bool [T], over the completion's tokens.
    """
    used = is_in_group[scores.position]
    s, a, i = scores.strength[used], scores.answer[used], scores.image[used]
    return Sums(*(float(x) for x in ((s * a).sum(), (s * i).sum(), s.sum(), a.sum(), i.sum(), used.sum())))


def total(sums: Sequence[Sums]) -> Sums:
    """Of several rollouts."""
    return Sums(*(float(x) for x in np.sum(np.asarray(sums), 0)))


def ratio(sums: Sums) -> float | np.ndarray:
    """PALR of sums; of arrays of them, an array."""
    return sums.corrected_by_answer / (sums.corrected_by_answer + sums.corrected_by_image + EPS)


def interval(sums: Sequence[Sums], *, seed: int, samples: int = 2000) -> tuple[float, float]:
    """Bootstrap 95 % interval of the ratio, resampling rollouts."""
    n = len(sums)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples)  # [samples, rollouts]
    resampled = Sums(*np.moveaxis(counts @ np.asarray(sums), -1, 0))
    low, high = np.percentile(ratio(resampled), [2.5, 97.5])
    return float(low), float(high)
