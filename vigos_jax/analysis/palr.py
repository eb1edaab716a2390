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

import numpy as np

# Groups of tokens, by the parts of the completion; T_y is every token, delimiters included.
GROUPS = {"T_d": ("description",), "T_ra": ("reasoning", "answer"), "T_y": ("completion",)}
EPS = 1e-8


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """The supervised tokens of one rollout, one entry per token and teacher; arrays [n].

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


def token_scores(
    *,
    position: np.ndarray,
    role: np.ndarray,
    shows_reference: np.ndarray,
    student: np.ndarray,
    teacher: np.ndarray,
    wrong: np.ndarray,
    image: np.ndarray,
) -> TokenScores:
    """s, c^A and c^I from log-probabilities of the observed tokens, arrays [n].

    Args:
      shows_reference: bool, whether the entry's role is shown the answer.
      student, teacher: log p and log q.
      wrong, image: log q_wrong and log q_imgcf.
    """
    gain = np.maximum(np.asarray(teacher, np.float64) - wrong, 0.0)
    return TokenScores(
        position=np.asarray(position),
        role=np.asarray(role),
        strength=np.abs(np.asarray(teacher, np.float64) - student),
        answer=np.where(shows_reference, gain, 0.0),
        image=np.maximum(np.asarray(teacher, np.float64) - image, 0.0),
    )


def group_sums(scores: TokenScores, is_in_group: np.ndarray) -> np.ndarray:
    """[sum s c^A, sum s c^I, sum s, sum c^A, sum c^I, tokens] over the group's entries of one rollout.

    Args:
      is_in_group: bool [T], over the completion's tokens.
    """
    used = is_in_group[scores.position]
    s, a, i = scores.strength[used], scores.answer[used], scores.image[used]
    return np.array([(s * a).sum(), (s * i).sum(), s.sum(), a.sum(), i.sum(), used.sum()], np.float64)


def ratio(sums: np.ndarray) -> np.ndarray:
    """PALR of summed `group_sums`, [..., 6] -> [...]."""
    return sums[..., 0] / (sums[..., 0] + sums[..., 1] + EPS)


def interval(sums: np.ndarray, *, seed: int, samples: int = 2000) -> tuple[float, float]:
    """Bootstrap 95 % interval of the ratio, resampling rollouts. sums: [rollouts, 6]."""
    n = len(sums)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples)  # [samples, rollouts]
    low, high = np.percentile(ratio(counts @ sums), [2.5, 97.5])
    return float(low), float(high)
