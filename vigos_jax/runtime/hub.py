"""Uploads to the Hugging Face hub: private, and with a token from the environment alone."""

import os
import pathlib
import re

from vigos_jax.errors import InputError

_TOKEN = "HF_TOKEN"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name


def token_for(repository: str) -> str:
    """The environment's token; InputError if there is none."""
    token = os.environ.get(_TOKEN, "").strip()
    # What no header can carry would fail inside the client, whose messages show it.
    if not token or not token.isascii() or not token.isprintable():
        raise InputError(
            f"config.export.push_to={repository!r} needs a token that may write there in the environment variable "
            f"{_TOKEN} (printable ASCII); or leave config.export.push_to empty"
        )
    return token


def reason(error: BaseException) -> str:
    """An error's own words in one line of at most 200 characters; the token, which they may quote, is not shown."""
    text, token = " ".join(str(error).split()), os.environ.get(_TOKEN, "").strip()
    for shown in {token, repr(token)[1:-1], repr(token.encode(errors="replace"))[2:-1]} if token else ():
        text = text.replace(shown, "***")
    return text[:200]


def push(folder: pathlib.Path, repository: str) -> str:
    """Uploads a folder into a private repository, made if it is not there, and returns its address.

    Args:
      repository: owner/name.

    Raises:
      InputError: no token, a repository that others can read, or the hub's refusal. The folder stays as it is.
    """
    import huggingface_hub

    token = token_for(repository)
    try:
        api = huggingface_hub.HfApi(token=token)
        address = str(api.create_repo(repository, private=True, exist_ok=True))
        is_private = api.repo_info(repository).private
        if is_private:
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of vigos_jax")
    except Exception as e:
        raise InputError(
            f"config.export.push_to={repository!r}: the hub refused: {type(e).__name__}: {reason(e)}; try another "
            f"name or token, the export itself is complete in {folder}"
        ) from None  # the cause's own text may show the token
    if not is_private:
        raise InputError(
            f"config.export.push_to={repository!r} is public and nothing was uploaded; choices: a new name, or make it "
            f"private; the export itself is complete in {folder}"
        )
    return address
