"""Tokenizer and image settings of a Hugging Face folder, read and checked."""

import json
import pathlib
import re
from typing import Any

import tokenizers

from vigos_jax.errors import InputError, one_line
from vigos_jax.models.config import ModelConfig
from vigos_jax.runtime.files import read_object

# Names of one and the same computation.
_IMAGE_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
CONTROL_SHAPE = re.compile(r"<\|[^|<>]+\|>")  # added tokens of this shape steer the model, "special" or not


def open_tokenizer(root: pathlib.Path) -> Any:
    """transformers' tokenizer of a folder; InputError naming the file that is missing or broken."""
    from transformers import AutoTokenizer  # slow to import

    if not (root / "tokenizer.json").is_file():
        raise InputError(f"{root / 'tokenizer.json'} is missing; a model folder needs it")
    read_settings(root / "tokenizer_config.json")
    load = lambda: AutoTokenizer.from_pretrained(root, local_files_only=True, trust_remote_code=False)  # noqa: E731
    return build(root / "tokenizer.json", load)


def image_settings(root: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """(the file, its settings) of a folder's image processor.

    Newer versions of transformers write them into processor_config.json, older ones into a file of their own. Where
    both are there, the newer one counts, as in transformers.
    """
    newer = root / "processor_config.json"
    nested = read_settings(newer, optional=True).get("image_processor")
    if isinstance(nested, dict):
        return newer, nested
    older = root / "preprocessor_config.json"
    if not older.exists():
        raise InputError(f"{older} is missing; a model folder needs it, or image_processor in {newer.name}")
    return older, read_settings(older)


def open_image_processor(root: pathlib.Path, model: ModelConfig) -> Any:
    """transformers' image processor of a folder; InputError if it is missing, broken, or cuts other patches."""
    from transformers import AutoImageProcessor  # slow to import

    path, settings = image_settings(root)
    kind = settings.get("image_processor_type") or _IMAGE_PROCESSORS[0]
    if kind not in _IMAGE_PROCESSORS:
        choices = ", ".join(_IMAGE_PROCESSORS)
        raise InputError(f"{path}: image_processor_type {kind!r} is not supported; choices: {choices}")
    options = {"backend": "pil", "local_files_only": True, "trust_remote_code": False}
    image_processor = build(path, lambda: AutoImageProcessor.from_pretrained(root, **options))
    sizes = {
        "patch_size": model.vision.patch_size,
        "merge_size": model.vision.spatial_merge_size,
        "temporal_patch_size": model.vision.temporal_patch_size,
    }
    for name, wanted in sizes.items():
        found = getattr(image_processor, name, None)
        if found != wanted:
            raise InputError(f"{path}: {name} {found!r} must be {wanted}, as in config.json")
    return image_processor


def check_ids(root: pathlib.Path, model: ModelConfig, *, vocabulary: dict, control: set[int], ends: list[int]) -> None:
    """Raises InputError unless the tokenizer's ids are this model's.

    Args:
      vocabulary: token -> id.
      control: ids of the control tokens.
      ends: ids of the end of a sequence and of the pad.
    """
    for name in ("image_token_id", "video_token_id"):
        if getattr(model, name) not in control:
            where = f"{root / 'config.json'}: {name} {getattr(model, name)}"
            raise InputError(f"{where} must be a control token of tokenizer.json")
    largest = max(*vocabulary.values(), *ends)
    if largest >= model.vocab_size or min(ends) < 0:
        raise InputError(
            f"{root}: the tokenizer is not this model's: its ids, the end's and the pad's must be below vocab_size "
            f"{model.vocab_size} of config.json and not negative; the largest is {largest}"
        )


def build(path: pathlib.Path, make):
    """Runs a loader on a folder's files; whatever it raises becomes one line, the panics of its Rust code too."""
    try:
        return make()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        raise InputError(f"cannot load {path}: {one_line(e)}; fetch it again") from e


def read_settings(path: pathlib.Path, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in a file of a model folder; {} for an optional one that is not there."""
    return {} if optional and not path.exists() else read_object(path, owner="a model folder")


def text_tokenizer(tokenizer) -> tuple[tokenizers.Tokenizer, dict[str, tuple[int, bool]]]:
    """A private copy that never emits control tokens, and all added tokens as {content: (id, is control)}.

    A copy, because the switch is a property of the shared object that transformers flips back and forth.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["special"] or CONTROL_SHAPE.fullmatch(token["content"]) is not None
    added = {token["content"]: (token["id"], token["special"]) for token in spec["added_tokens"]}
    copy = tokenizers.Tokenizer.from_str(json.dumps(spec | {"truncation": None, "padding": None}))
    copy.encode_special_tokens = True  # "encode them as text"; set once, never again
    return copy, added


def end_and_pad(root: pathlib.Path, tokenizer, turn_end: int | None) -> tuple[tuple[int, ...], int]:
    """(ids that end a sequence, pad id).

    The end ids are the union over all files of the folder and `turn_end`: each file alone is wrong in some published
    folder, and without the end-of-turn token generation runs to the token limit.

    Args:
      turn_end: id of the chat template's end-of-turn token.
    """
    config = read_settings(root / "config.json")
    generation = read_settings(root / "generation_config.json", optional=True)
    eos = _ids(root / "generation_config.json", generation.get("eos_token_id"))
    for section in (config.get("text_config") or {}, config):
        eos += _ids(root / "config.json", section.get("eos_token_id"))
    eos += [i for i in (tokenizer.eos_token_id, turn_end) if i is not None]
    pads = [i for i in (tokenizer.pad_token_id, generation.get("pad_token_id")) if i is not None]
    for name, ids in (("eos_token_id", eos), ("pad_token_id", pads)):
        if not ids or not all(type(i) is int for i in ids):
            raise InputError(
                f"{root}: {name} must be given by generation_config.json or tokenizer_config.json, got {ids}"
            )
    return tuple(dict.fromkeys(eos)), pads[0]


def _ids(path: pathlib.Path, value: Any) -> list[int]:
    """The ids that a file's `eos_token_id` names: none, one or several."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise InputError(f"{path}: eos_token_id {value!r} must be a token id, or a list of them")
    return list(ids)


def token_table(path: pathlib.Path, tokenizer, added: dict[str, tuple[int, bool]]) -> dict[int, bytes]:
    """Bytes of every token id of a byte-level BPE."""
    byte_of = {char: byte for byte, char in _byte_alphabet().items()}
    table = {index: content.encode() for content, (index, _) in added.items()}
    for token, index in tokenizer.get_vocab().items():
        if index in table:
            continue
        if not byte_of.keys() >= set(token):
            raise InputError(f"{path} must be a byte-level BPE; token {token!r} has other letters")
        table[index] = bytes(byte_of[char] for char in token)
    return table


def _byte_alphabet() -> dict[int, str]:
    """The letter a byte-level BPE writes for each byte: its own if printable, else the next from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
