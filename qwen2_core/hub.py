"""Finds a hub model's files: in the cache first, then on the hub, all of one commit.

What the cache has of a branch is used as it is, without asking the hub whether the branch has moved. A
process keeps to the commit that it found first.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qwen2_core.errors import CheckpointError

_logger = logging.getLogger(__name__)
_ANSWER_SECONDS = 8.0  # for the hub's first answer; after it, huggingface_hub's own limits count
_folders: dict[tuple[str, str, str | None], Path] = {}


def cached_snapshot(repo_id: str, revision: str | None = None) -> Path | None:
    """Returns the folder in the cache that holds a hub model's ``config.json``; its name is the commit.

    None where the cache does not have the model, or not at this revision.
    """
    key = (str(constants.HF_HUB_CACHE), repo_id, revision)
    if key in _folders and _folders[key].is_dir():
        return _folders[key]
    try:
        cached = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    except (HFValidationError, OSError, ValueError):
        return None
    if not isinstance(cached, str):
        return None
    return _folders.setdefault(key, Path(cached).parent)


def list_files(repo_id: str, revision: str | None = None) -> list[str]:
    """Asks the hub for the names of a model's files. Takes at most seconds.

    Raises:
        CheckpointError: the hub has no such model or revision, refuses it, or does not answer.
    """
    answer: list[Any] = []

    def ask() -> None:
        try:
            info = HfApi().model_info(repo_id, revision=revision, timeout=_ANSWER_SECONDS)
            answer.append([sibling.rfilename for sibling in info.siblings or ()])
        except Exception as error:  # of several libraries, by the version of huggingface_hub
            answer.append(error)

    # The timeout of a request is for each packet, and names are looked up without any.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    names = answer[0] if answer else TimeoutError(f"no answer within {_ANSWER_SECONDS:.0f} seconds")
    if isinstance(names, Exception):
        raise _explain(names, repo_id, revision) from names
    return names


def fetch(repo_id: str, names: Iterable[str], revision: str | None = None) -> Path:
    """Fetches files of a hub model that the cache lacks; returns the snapshot's folder.

    The first file decides the commit, where ``revision`` is a branch.

    Raises:
        CheckpointError: a file could not be had.
    """
    folder = None
    for name in names:
        _logger.info("fetching %s of %s from the Hugging Face hub", name, repo_id)
        try:
            folder = Path(hf_hub_download(repo_id, name, revision=revision)).parent
        except Exception as error:  # as above
            raise _explain(error, repo_id, revision, name) from error
        revision = folder.name
    if folder is None:
        raise ValueError("no file is named")
    return folder


def _explain(
    error: Exception, repo_id: str, revision: str | None, name: str | None = None
) -> CheckpointError:
    what = f"the hub model {repo_id}" if name is None else f"{name} of the hub model {repo_id}"
    if isinstance(error, HFValidationError):
        reason = "that is no hub id"
    elif isinstance(error, GatedRepoError):
        reason = "it is gated: ask for access on its page, then run `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        reason = "the hub has none of this name; if it is private, run `hf auth login`"
    elif isinstance(error, RevisionNotFoundError):
        reason = f"it has no revision {revision}"
    elif isinstance(error, OfflineModeIsEnabled):
        reason = "it is not in the cache, and HF_HUB_OFFLINE forbids to fetch it"
    elif isinstance(error, OSError) and error.errno is not None:
        reason = f"the cache {constants.HF_HUB_CACHE} fails: {error.strerror}"
    else:
        first = (str(error).strip().splitlines() or [""])[0]
        why = f"{constants.ENDPOINT} fails: {type(error).__name__}: {first}"
        reason = f"it is not in the cache, and {re.sub('//[^/@]*@', '//', why)}"  # without a password
    return CheckpointError(f"There is no model directory {repo_id}, and {what} could not be had ({reason}).")
