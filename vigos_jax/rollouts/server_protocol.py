"""Requests to inference servers and parsing of their replies: a table of two dialects.

Every sampling field is sent, as servers take missing ones from the model folder. Requests and replies hold token ids:
servers never tokenise text. vLLM was tested (0.32); the SGLang dialect follows its source and is untested.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vigos_jax.rollouts.engine import EngineFailed
from vigos_jax.rollouts.sampling import Sampling

_LEAST_LOGP = -9999.0  # vLLM's number for NaN, for minus infinity and for one that is missing


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A row as a server gets it.

    Attributes:
      ids: with one pad token per image: servers expand it.
      expanded: with a pad per visual token, as the model reads it.
      images: data URLs, in the order of the pads.
    """

    ids: tuple[int, ...]
    expanded: tuple[int, ...]
    images: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Answer:
    """A reply.

    Attributes:
      ids, logps: of the completion.
      prompt_ids: that the server's model read; None where it does not say.
      reason: why the completion ended: "stop", "length", or something that is a failure.
      model: the name that the server answered under; None where it does not say.
    """

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    prompt_ids: tuple[int, ...] | None
    reason: str
    model: str | None


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a reply is held against.

    Attributes:
      names: that it may be answered under.
      stop_ids: the tokens that end a completion.
      pads: ids of pads, in whose place a dialect may give other ids.
    """

    names: frozenset[str]
    stop_ids: tuple[int, ...]
    vocab_size: int
    max_tokens: int
    pads: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How one kind of server is spoken to. Paths are after a server's base address.

    Attributes:
      health, models: GET; the second lists what is served, as OpenAI's protocol does.
      generate, load, unload: POST.
      request: (prompt, model or adapter, is_adapter, sampling, seed, stop_ids) -> body of `generate`.
      read: reply of `generate` -> Answer; KeyError, TypeError, ValueError or IndexError for another shape.
      keeps_pads: whether the prompt ids of a reply have the pads that were sent.
      is_unknown: (status, message) of a rejected request -> whether its adapter is not loaded.
      probes: (path, required options) of routes that a server has only if it was started with those options; the last
        is for adapters.
      refuses: sampling field -> how its meaning differs there.
    """

    health: str
    models: str
    generate: str
    load: str
    unload: str
    request: Callable[[Prompt, str, bool, Sampling, int, Sequence[int]], dict[str, Any]]
    read: Callable[[Mapping[str, Any]], Answer]
    keeps_pads: bool
    is_unknown: Callable[[int, str], bool]
    probes: tuple[tuple[str, str], ...] = ()
    refuses: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _vllm_request(
    prompt: Prompt, model: str, is_adapter: bool, sampling: Sampling, seed: int, stop_ids: Sequence[int]
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,  # an adapter's name is a model's there
        "token_ids": list(prompt.ids),
        "return_token_ids": True,
        "sampling_params": {
            "n": 1,
            "max_tokens": sampling.max_tokens,
            "min_tokens": 0,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or -1,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": 0.0,
            "seed": seed,
            "stop": [],
            "stop_token_ids": list(stop_ids),
            "ignore_eos": True,  # or the server's own ends would be added to these
            "logprobs": 0,
            "detokenize": False,
            "skip_special_tokens": False,
        },
    }
    if prompt.images:
        body["content_parts"] = [{"type": "image_url", "url": uri} for uri in prompt.images]
    return body


def _vllm_answer(reply: Mapping[str, Any]) -> Answer:
    (choice,) = reply["choices"]
    content = (choice["logprobs"] or {}).get("content") or []
    _check_same(choice["token_ids"], [entry["token_id"] for entry in content])
    return Answer(
        ids=_ids(choice["token_ids"]),
        logps=_logps(entry["logprob"] for entry in content),
        prompt_ids=_ids(reply["prompt_token_ids"]),
        reason=str(choice["finish_reason"]),
        model=reply["model"],
    )


def _sglang_request(
    prompt: Prompt, model: str, is_adapter: bool, sampling: Sampling, seed: int, stop_ids: Sequence[int]
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "input_ids": list(prompt.ids),
        "sampling_params": {
            "n": 1,
            "max_new_tokens": sampling.max_tokens,
            "min_new_tokens": 0,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or -1,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": 0.0,
            "sampling_seed": seed,
            "stop_token_ids": list(stop_ids),
            "ignore_eos": False,  # with it, stop_token_ids are not looked at either
            "skip_special_tokens": False,
        },
        "return_logprob": True,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "return_text_in_logprobs": False,
        "return_prompt_token_ids": True,
        "stream": False,
    }
    if prompt.images:
        body["image_data"] = list(prompt.images)
    if is_adapter:
        body["lora_path"] = model
    return body


def _sglang_answer(reply: Mapping[str, Any]) -> Answer:
    meta = reply["meta_info"]
    pairs = meta["output_token_logprobs"]
    prompt_ids = reply.get("prompt_token_ids", meta.get("prompt_token_ids"))
    reason = meta["finish_reason"]
    _check_same(reply["output_ids"], [pair[1] for pair in pairs])
    return Answer(
        ids=_ids(reply["output_ids"]),
        logps=_logps(pair[0] for pair in pairs),
        prompt_ids=None if prompt_ids is None else _ids(prompt_ids),
        reason=str(reason["type"] if isinstance(reason, Mapping) else reason),
        model=None,
    )


def _check_same(ids: Sequence[int], scored: Sequence[int]) -> None:
    if any(a != b for a, b in zip(ids, scored, strict=False)):
        raise ValueError("its log-probabilities are of other tokens")


def _ids(values: Any) -> tuple[int, ...]:
    ids = tuple(values)
    if not all(type(i) is int for i in ids):
        raise TypeError("token ids must be whole numbers")
    return ids


def _logps(values: Any) -> tuple[float, ...]:
    return tuple(math.nan if p is None else float(p) for p in values)


DIALECTS = {
    "vllm": Dialect(
        health="/health",
        models="/v1/models",
        generate="/inference/v1/generate",
        load="/v1/load_lora_adapter",
        unload="/v1/unload_lora_adapter",
        request=_vllm_request,
        read=_vllm_answer,
        keeps_pads=True,
        is_unknown=lambda status, message: status == 404 and message != "Not Found",  # that is a route's
        probes=(
            ("/inference/v1/generate", "--enable-scale-out"),
            ("/v1/load_lora_adapter", "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"),
        ),
    ),
    "sglang": Dialect(
        health="/health",
        models="/v1/models",
        generate="/generate",
        load="/load_lora_adapter",
        unload="/unload_lora_adapter",
        request=_sglang_request,
        read=_sglang_answer,
        keeps_pads=False,  # an image's pads become a hash of it
        is_unknown=lambda status, message: status == 400 and "lora" in message.lower(),
        refuses={"repetition_penalty": "SGLang counts the completion's tokens only, not the prompt's"},
    ),
}


def check_answer(answer: Answer, prompt: Prompt, rules: Rules, *, url: str) -> str | None:
    """The reason why a row failed, or None.

    Raises:
      EngineFailed: the reply does not match what is trained on: other prompt ids, other stop tokens, another model,
        invalid ids, missing log-probabilities. Every row would fail alike.
    """
    if answer.model is not None and answer.model not in rules.names:
        names = ", ".join(sorted(rules.names))
        raise EngineFailed(f"{url} answered as model {answer.model!r}; it was asked as {names}")
    if answer.prompt_ids is not None:
        _check_prompt(answer.prompt_ids, prompt, rules, url)
    if answer.reason not in ("stop", "length") or not answer.ids:
        return f"{url} ended the request with {answer.reason!r} after {len(answer.ids)} tokens"
    if strangers := [i for i in answer.ids if not 0 <= i < rules.vocab_size]:
        raise EngineFailed(f"{url} gave the token id {strangers[0]}; ids must be from 0 to {rules.vocab_size - 1}")
    if len(answer.logps) != len(answer.ids) or not all(math.isfinite(p) and p > _LEAST_LOGP for p in answer.logps):
        count = sum(math.isfinite(p) and p > _LEAST_LOGP for p in answer.logps)
        raise EngineFailed(
            f"{url} gave {len(answer.ids)} tokens and {count} finite log-probabilities; each token needs one"
        )
    _check_end(answer, rules, url)
    return None


def _check_prompt(got: Sequence[int], prompt: Prompt, rules: Rules, url: str) -> None:
    sent = prompt.expanded
    pairs = zip(sent, got, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b and a not in rules.pads), min(len(sent), len(got)))
    if at == len(sent) == len(got):
        return
    shown = [str(ids[at]) if at < len(ids) else "nothing" for ids in (sent, got)]
    # Behind an image all is shifted where the server made another size of it.
    size = "; it may resize images: its pixel limits must be those of the model folder" if prompt.images else ""
    raise EngineFailed(
        f"{url} read another prompt: {len(got)} tokens, sent were {len(sent)}; the first difference is at position "
        f"{at}: sent {shown[0]}, received {shown[1]}{size}"
    )


def _check_end(answer: Answer, rules: Rules, url: str) -> None:
    n, last = len(answer.ids), answer.ids[-1]
    if n > rules.max_tokens or (answer.reason == "length" and n < rules.max_tokens):
        raise EngineFailed(
            f"{url} ended a completion after {n} tokens; config.sampling.max_tokens asks for {rules.max_tokens}: the "
            "server's context (vLLM: --max-model-len) must hold prompt and completion"
        )
    if answer.reason == "stop" and last not in rules.stop_ids:
        ends = ", ".join(map(str, rules.stop_ids))
        raise EngineFailed(f"{url} ended a completion with the token {last}; the model folder's ends are {ends}")
