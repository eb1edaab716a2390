"""Exports a full (merged) model or a PEFT adapter as a Hugging Face folder, which is either complete or absent.

Everything is written into a hidden folder, checked if requested, synced to disk and moved into place (`folder`).
The first process writes; all take part in gathering the tensors, and all stop if a step fails in the first.
"""

import itertools
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from vigos_jax.errors import InputError
from vigos_jax.export import folder
from vigos_jax.export.model_card import RunFacts, card_text
from vigos_jax.export.verify import compare
from vigos_jax.models.families import tensor_table
from vigos_jax.models.layers import LoraSpec
from vigos_jax.models.quantization import has_quantised
from vigos_jax.models.variables import Variables
from vigos_jax.runtime import hub
from vigos_jax.runtime.distributed import first_decides, is_first
from vigos_jax.runtime.progress import say
from vigos_jax.session import Session
from vigos_jax.weights import reading, writing
from vigos_jax.weights.adapters import adapter_tensors, write_adapter
from vigos_jax.weights.safetensors_file import byte_count
from vigos_jax.weights.weight_files import open_weights

# Config, tokenizer, processor and license files of a base folder, copied byte for byte: rewriting them through a
# library would change what other programs read. Weights, model card and any other files are not copied.
_COMPANIONS = (
    *("config.json", "*_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.json", "*.jinja", "LICENSE*", "NOTICE*"),
    "additional_chat_templates/*.jinja",
)
_NO_COMPANIONS = ("adapter_config.json",)


def check_options(options, *, has_adapter: bool) -> None:
    """Raises InputError early for settings in `config.export` that are bound to fail."""
    if options.kind == "adapter" and not has_adapter:
        raise InputError("config.export.kind=adapter needs an adapter, and this student has none; choices: merged")
    if options.push_to:
        hub.token_for(options.push_to)


def export(
    session: Session,
    trained: Variables,
    config,
    output: pathlib.Path,
    *,
    run: RunFacts | None = None,
    record: pathlib.Path | None = None,
) -> dict[str, Any] | None:
    """Writes the student as a Hugging Face folder, as `config.export` says.

    Args:
      trained: variables that replace or adapt the base; `{}` for the base itself.
      output: the folder; must be absent or empty.
      run: the training that it comes from, for the model card.
      record: file for a `folder.Record`, by which a run later recognises its export.

    Returns:
      What `verify.compare` found, where `config.export.check` asks for it or an adapter was merged into
      bfloat16 beside a base that is not quantised; else None.

    Raises:
      InputError: an adapter is asked for where none was trained, the folder exists and is not empty or cannot be
        written, the check fails, or the hub refuses.
    """
    e = config.export
    check_options(e, has_adapter="lora" in trained)
    with folder.held_for(output):
        report = _write(session, trained, config, output, run, record)
    if is_first():
        if report:
            print(json.dumps(report))
        if e.push_to:
            say(f"pushed to {hub.push(output.resolve(), e.push_to)}")
    return report


def _write(
    session: Session,
    trained: Variables,
    config,
    output: pathlib.Path,
    run: RunFacts | None,
    record: pathlib.Path | None,
) -> dict[str, Any] | None:
    e = config.export
    lora = session.model.lora if "lora" in trained else None
    tensors = list(_tensors(session, trained, kind=e.kind, dtype=e.dtype))
    size = sum(byte_count(x) for _, x in tensors)
    temporary = pathlib.Path(first_decides(lambda: str(folder.prepare(output, size=size))))
    try:
        if e.kind == "adapter":
            write_adapter(temporary, trained["lora"], session.config, _spec(session), base=session.name)
        else:
            writing.save_sharded(temporary, tensors, max_shard_bytes=int(e.max_shard_gb * 2**30))
            first_decides(lambda: _copy_companions(session, temporary, dtype=e.dtype))
        # A small device that holds the quantised base need not hold the whole model too: only if asked.
        is_whole = not has_quantised(session.base)
        rounds = e.kind == "merged" and e.dtype == "bfloat16" and lora is not None and is_whole
        report = compare(session, trained, config, temporary) if e.check or rounds else None
        family = session.config.family
        card = card_text(config, base=session.folder, family=family, lora=lora, run=run, report=report)
        first_decides(lambda: (temporary / "README.md").write_text(card, encoding="utf-8"))
    except Exception as e:
        if is_first():
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(e, OSError):
            raise InputError(f"cannot write config.export.output={str(output)!r}: {e.strerror}; choose another") from e
        raise
    facts = {"kind": e.kind, "dtype": e.dtype, "step": run.step if run else 0}
    first_decides(lambda: folder.publish(temporary, output, record=record, facts=facts))
    return report


def _spec(session: Session) -> LoraSpec:
    """What the model's adapters are; ValueError where it has none, rather than an export without them."""
    if session.model.lora is None:
        raise ValueError("the model has no adapters to export")
    return session.model.lora


def _tensors(
    session: Session, trained: Variables, *, kind: str, dtype: str
) -> Iterator[tuple[str, writing.FileTensor]]:
    config = session.config
    if kind == "adapter":
        return iter(adapter_tensors(trained["lora"], config, _spec(session)))
    params = trained.get("params", session.base)
    merged = {"lora": trained["lora"], "scale": _spec(session).scale} if "lora" in trained else {}
    table, files = tensor_table(config), open_weights(session.folder)
    tensors = writing.stream_tensors(params, table, config, dtype=jnp.dtype(dtype), files=files, **merged)
    return itertools.chain(tensors, writing.copied_tensors(files, reading.carried_names(files, config)))


def _copy_companions(session: Session, written: pathlib.Path, *, dtype: str) -> None:
    base = session.folder
    for pattern in _COMPANIONS:
        for file in sorted(base.glob(pattern)):
            if file.is_file() and file.name not in _NO_COMPANIONS:
                copy = written / file.relative_to(base)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
    _correct(written / "config.json", dtype=dtype, is_tied=session.config.tie_embeddings)


def _correct(path: pathlib.Path, *, dtype: str, is_tied: bool) -> None:
    """Updates dtype and tied embeddings in the copied config.json to the written weights; the rest is unchanged."""
    config = json.loads(path.read_text(encoding="utf-8"))
    now = {"torch_dtype": dtype, "dtype": dtype} | ({} if is_tied else {"tie_word_embeddings": False})
    changed = False
    for section in [config, config.get("text_config") or {}, config.get("vision_config") or {}]:
        for key in now.keys() & section.keys():
            changed |= section[key] != now[key]
            section[key] = now[key]
    if changed:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
