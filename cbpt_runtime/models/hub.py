"""Fetching weights the user asked for by name; the only module here that may use the network."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from cbpt_runtime.errors import CheckpointError

_TIMEOUT_S = 10
_TEXT_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "config.json",
)
_CONFIG_NAME = "open_clip_config.json"
_WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)


def fetch_hub_model(repo: str) -> tuple[Path, Path]:
    """Return configuration and weights of an open_clip model on the Hugging Face hub, or in its local cache.

    Raises:
        CheckpointError: Not in the cache and no network, no such repository, or not an open_clip model.
    """
    config = _first_hub_file(repo, (_CONFIG_NAME,))
    weights = _first_hub_file(repo, _WEIGHT_NAMES)
    if b"hf_tokenizer_name" in config.read_bytes() and find_local_files(repo, _TEXT_FILES[0], None) is None:
        _fetch_small_files(repo)
    return config, weights


def find_local_files(repo: str, marker: str, folder: Path | None) -> Path | None:
    """Find the folder that holds `marker`: the checkpoint's own, or the local cache of `repo`. No network.

    Args:
        repo: Hub id, as a configuration names it.
        marker: A file that must be there.
        folder: The checkpoint's own folder.
    """
    if folder is not None and (folder / marker).is_file():
        return folder
    try:
        cached = huggingface_hub.try_to_load_from_cache(repo, marker)
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def fetch_pretrained(tag_config: Mapping[str, Any]) -> Path:
    """Weights of an open_clip pretrained tag, from the local cache where possible.

    Args:
        tag_config: What `open_clip.get_pretrained_cfg` answers; every tag since open_clip 3.0 is on the hub.

    Raises:
        CheckpointError: Not in the cache and no network.
    """
    repo, _, filename = str(tag_config["hf_hub"]).rpartition("/")
    names = (filename,) if filename else _WEIGHT_NAMES
    safe = tuple(str(PurePosixPath(name).with_suffix(".safetensors")) for name in names)
    return _first_hub_file(repo, tuple(dict.fromkeys(safe + names)))


def fetch_text_files(text_cfg: Mapping[str, Any]) -> None:
    """Brings the tokenizer and text configuration of a built-in architecture into the hub's cache.

    Only for open_clip's own configurations: one that came with weights must not choose what is fetched.

    Raises:
        CheckpointError: Not in the cache and no network.
    """
    for key, marker in (("hf_tokenizer_name", "tokenizer_config.json"), ("hf_model_name", "config.json")):
        repo = text_cfg.get(key)
        if repo and find_local_files(repo, marker, None) is None:
            _fetch_small_files(repo)


def _fetch_small_files(repo: str) -> None:
    _check_reachable(repo)
    try:
        huggingface_hub.snapshot_download(repo, allow_patterns=list(_TEXT_FILES), etag_timeout=_TIMEOUT_S)
    except Exception as error:  # hub versions differ in what they raise
        raise _not_found(repo, _TEXT_FILES) from error


def _first_hub_file(repo: str, filenames: tuple[str, ...]) -> Path:
    """Return the first of the files that exists; one look into the cache for all, then the network."""
    try:
        for filename in filenames:
            cached = huggingface_hub.try_to_load_from_cache(repo, filename)
            if isinstance(cached, str):
                return Path(cached)
    except HFValidationError as error:
        raise _not_found(repo, filenames) from error
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        _check_reachable(repo)
    last: Exception | None = None
    for filename in filenames:
        try:
            return Path(huggingface_hub.hf_hub_download(repo, filename, etag_timeout=_TIMEOUT_S))
        except LocalEntryNotFoundError as error:  # offline mode, or the connection went away
            raise _offline(repo, error) from error
        except Exception as error:  # hub versions differ in what they raise
            last = error
    raise _not_found(repo, filenames) from last


def _check_reachable(repo: str) -> None:
    """One short request, through the configured proxy if any, instead of a library's many retries."""
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = urllib.request.Request(url, method="HEAD")  # noqa: S310  https, or the user's own HF_ENDPOINT
    try:
        urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()  # noqa: S310
    except urllib.error.HTTPError as error:
        error.close()  # an answer, whatever it says: the network is there
    except (OSError, ValueError) as error:
        raise _offline(repo, error) from error


def _offline(repo: str, error: BaseException) -> CheckpointError:
    reason = getattr(error, "reason", None) or error
    return CheckpointError(
        expected=f"hf-hub:{repo} in the local cache, or a network connection to fetch it",
        got=f"neither ({str(reason).splitlines()[0] if str(reason) else type(error).__name__:.200})",
        fix="Fetch it on a machine with network access and pass the folder or file.",
    )


def _not_found(repo: str, filenames: tuple[str, ...]) -> CheckpointError:
    return CheckpointError(
        expected=f"an open_clip model (one of {', '.join(filenames)}) at hf-hub:{repo}",
        got="no such repository or file, or no access to it",
        fix="Check the id; for a private or gated repository log in with the hub's own tool first.",
    )
