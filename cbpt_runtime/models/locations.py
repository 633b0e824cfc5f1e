"""What a source name stands for: the files of a checkpoint and its settings, before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip

from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.config import read_json
from cbpt_runtime.models.hub import fetch_hub_model, fetch_pretrained, fetch_text_files
from cbpt_runtime.models.huggingface import hugging_face_settings, is_hugging_face
from cbpt_runtime.models.weights import first_few

CONFIG_NAME = "open_clip_config.json"
_HUB_PREFIX = "hf-hub:"
_LOCAL_PREFIX = "local-dir:"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
# Where a folder holds several, the first of these is taken.
_PREFERRED_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
# What trainers write beside the weights.
_BESIDE_WEIGHTS = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args|random_states)")
_PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color")


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """Files and settings a source name stands for, before any weight is read.

    Attributes:
        source: What the user named.
        weights: The weights file, or its shards.
        weights_name: Which of several sets of weights in the file to take.
        format: As in `Checkpoint`; None where the content of the weights file says it.
        settings: `model_cfg` and `preprocess_cfg`, not yet checked; None where the architecture is unknown.
        folder: As in `Checkpoint`.
        notes: As in `Checkpoint`.
    """

    source: str
    weights: tuple[Path, ...]
    weights_name: str | None = None
    format: str | None = None
    settings: Mapping[str, Any] | None = None
    folder: Path | None = None
    notes: tuple[str, ...] = ()


def locate(source: str | Path, *, model: str | Path | None = None) -> Located:
    """Find the files a source name stands for; download them where the name asks for that.

    Raises:
        CheckpointError: Nothing there, or the configuration cannot be read.
    """
    name = str(source).removeprefix(_LOCAL_PREFIX)
    given = None if model is None else _named_settings(model)
    if name.startswith(_HUB_PREFIX):
        config_path, weights = fetch_hub_model(name.removeprefix(_HUB_PREFIX))
        return Located(
            source=name,
            weights=(weights,),
            format="pretrained",
            settings=given or _settings_file(config_path),
            folder=config_path.parent,
        )
    path = Path(name)
    try:
        before, mark, weights_name = name.rpartition("#")
        if mark and not path.exists() and Path(before).exists():
            return replace(_locate_path(Path(before), given), source=name, weights_name=weights_name)
        if path.exists():
            return replace(_locate_path(path, given), source=name)
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise CheckpointError(
            expected=f"a readable checkpoint {name:.300}", got=reason, fix="Check the path and its mode."
        ) from error
    except ValueError:  # a name no path can have
        pass
    return _locate_tag(name, model)


def _locate_path(path: Path, given: Mapping[str, Any] | None) -> Located:
    if path.is_dir():
        return _locate_folder(path, given)
    if not path.is_file():
        raise CheckpointError(
            expected=f"a file or a folder at {path}", got="a pipe or a device", fix="Copy it to a file."
        )
    if path.suffix == ".distcp":
        raise _distributed(path.parent)
    beside = path.parent / CONFIG_NAME
    notes: tuple[str, ...] = ()
    settings = given or (_settings_file(beside) if beside.is_file() else None)
    if settings is None and is_hugging_face(path.parent):
        settings, notes = hugging_face_settings(path.parent)
    return Located(source=str(path), weights=(path,), settings=settings, folder=path.parent, notes=notes)


def _locate_folder(folder: Path, given: Mapping[str, Any] | None) -> Located:
    _refuse_other_folders(folder)
    config_path = folder / CONFIG_NAME
    notes: tuple[str, ...] = ()
    layout = "open_clip-folder"
    if given is not None:
        settings: Mapping[str, Any] = given
    elif config_path.is_file():
        settings = _settings_file(config_path)
    elif is_hugging_face(folder):
        layout = "huggingface-folder"
        settings, notes = hugging_face_settings(folder)
    else:
        raise CheckpointError(
            expected=f"{CONFIG_NAME} or a transformers config.json in {folder}",
            got="a folder without it",
            fix="Name an open_clip or CLIP folder or a weights file, or give the architecture with --model.",
        )
    weights = _weights_files(folder)
    return Located(
        source=str(folder), weights=weights, format=layout, settings=settings, folder=folder, notes=notes
    )


def _weights_files(folder: Path) -> tuple[Path, ...]:
    """Return the one weights file of a folder, or all shards of it."""
    preferred = [folder / name for name in _PREFERRED_WEIGHTS if (folder / name).is_file()]
    if preferred:
        return (preferred[0],)
    for index in sorted(folder.glob("*.index.json")):
        return _indexed_shards(index)
    candidates = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in _WEIGHT_SUFFIXES and path.is_file() and not _BESIDE_WEIGHTS.match(path.name)
    )
    shards = [match for path in candidates if (match := _SHARD.fullmatch(path.name))]
    if shards and len({(match[1], match[3], match[4]) for match in shards}) == 1:
        stem, _, total, suffix = shards[0].groups()
        names = [f"{stem}-{number:05}-of-{total}.{suffix}" for number in range(1, min(int(total), 1000) + 1)]
        return _present(folder, names)
    if len(candidates) != 1:
        raise CheckpointError(
            expected=f"{_PREFERRED_WEIGHTS[0]} in {folder}",
            got=first_few([path.name for path in candidates]) or "no weights file",
            fix="Add the weights file, or name the one to use instead of the folder.",
        )
    return (candidates[0],)


def _indexed_shards(index: Path) -> tuple[Path, ...]:
    listed = read_json(index, max_bytes=20_000_000).get("weight_map")
    names = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
    if not names or any(Path(name).name != name or not Path(name).suffix for name in names):
        raise CheckpointError(
            expected=f"names of files beside it under weight_map in {index}",
            got=first_few(names) or "none",
            fix="Download or copy the index again.",
        )
    return _present(index.parent, names)


def _present(folder: Path, names: Sequence[str]) -> tuple[Path, ...]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            expected=f"all {len(names)} shards of the weights in {folder}",
            got=f"{len(names) - len(missing)}, without {first_few(missing)}",
            fix="Download or copy the missing ones.",
        )
    return tuple(folder / name for name in names)


def _refuse_other_folders(folder: Path) -> None:
    """Names folders that hold something else than the weights of a model."""
    if (folder / ".metadata").is_file() and any(folder.glob("*.distcp")):
        raise _distributed(folder)
    if any(folder.glob("*_optim_states.pt")) or any(folder.glob("*/*_optim_states.pt")):
        raise CheckpointError(
            expected=f"the weights of one model in {folder}",
            got="a DeepSpeed checkpoint, split over processes",
            fix="Join it with the zero_to_fp32.py in the folder, and name the file it writes.",
        )
    if (folder / "adapter_config.json").is_file() and not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(
            expected=f"the weights of a whole model in {folder}",
            got="an adapter (LoRA), which only changes another model's weights",
            fix="Merge it into its model (merge_and_unload in the peft library) and save that.",
        )


def _distributed(folder: Path) -> CheckpointError:
    return CheckpointError(
        expected=f"the weights of one model in {folder}",
        got="a distributed checkpoint (DCP), split over processes",
        fix="Join it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pt",
    )


def _locate_tag(name: str, model: str | Path | None) -> Located:
    architecture = str(model).replace("/", "-")
    tag_config = {} if model is None else open_clip.get_pretrained_cfg(architecture, name)
    if not tag_config:
        tags = [] if model is None else open_clip.list_pretrained_tags_by_model(architecture)
        known = f"; the pretrained tags of {architecture} are {', '.join(tags)}" if tags else ""
        raise CheckpointError(
            expected="an open_clip folder, a weights file, hf-hub:owner/name, or a tag with its --model",
            got=f"{name}, which is none of them{known}",
            fix="Check the path or the tag.",
        )
    config = open_clip.get_model_config(architecture)
    fetch_text_files(config["text_cfg"])
    notes: tuple[str, ...] = ()
    if bool(config.get("quick_gelu")) != bool(tag_config.get("quick_gelu")):
        config["quick_gelu"] = bool(tag_config.get("quick_gelu"))
        notes = (f"quick_gelu set to {config['quick_gelu']}, as {name} was trained",)
    settings = {"model_cfg": config, "preprocess_cfg": _known_preprocess(tag_config)}
    weights = fetch_pretrained(tag_config)
    return Located(source=name, weights=(weights,), format="pretrained", settings=settings, notes=notes)


def _named_settings(model: str | Path) -> Mapping[str, Any]:
    """Return settings for --model: a configuration file, or the name of an open_clip architecture."""
    if Path(model).suffix == ".json" or Path(model).is_file():
        return _settings_file(Path(model))
    architecture = str(model).replace("/", "-")
    config = open_clip.get_model_config(architecture) if ":" not in architecture else None
    if config is None:
        names = {name.lower(): name for name in open_clip.list_models()}
        close = [names[name] for name in get_close_matches(architecture.lower(), names)]
        hint = f" Close: {', '.join(close)}." if close else ""
        raise CheckpointError(
            expected="--model as an open_clip architecture or a JSON configuration file",
            got=str(model),
            fix=f"open_clip.list_models() names the architectures.{hint}",
        )
    return {"model_cfg": config, "preprocess_cfg": _usual_preprocess(architecture)}


def _settings_file(path: Path) -> Mapping[str, Any]:
    content = read_json(path)
    settings = content if "model_cfg" in content else {"model_cfg": content}
    for key in ("model_cfg", "preprocess_cfg"):
        if not isinstance(settings.get(key, {}), dict):
            raise CheckpointError(
                expected=f"an object under {key} in {path}",
                got=type(settings[key]).__name__,
                fix="Correct the configuration file.",
            )
    return settings


def _usual_preprocess(architecture: str) -> dict[str, Any]:
    """Return the preprocessing an architecture's published weights share; else open_clip's default."""
    found = [
        _known_preprocess(open_clip.get_pretrained_cfg(architecture, tag))
        for tag in open_clip.list_pretrained_tags_by_model(architecture)
    ]
    return found[0] if found and all(entry == found[0] for entry in found) else {}


def _known_preprocess(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in _PREPROCESS_KEYS if key in settings}
