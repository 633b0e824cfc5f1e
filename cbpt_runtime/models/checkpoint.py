"""A suspect checkpoint: where it came from, what it says it is, and its weights.

Reading decides nothing about trust and runs nothing from the file. What is wrong with the weights (keys that
do not fit the architecture, NaN) is collected in `anomalies`: inspection shows them, building an encoder
refuses them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor, nn

from cbpt_runtime.errors import CheckpointError, ConfigError
from cbpt_runtime.models.architecture import build_model
from cbpt_runtime.models.config import check_model_config, read_json
from cbpt_runtime.models.hub import fetch_hub_model, fetch_pretrained, fetch_text_files
from cbpt_runtime.models.preprocess import Preprocess
from cbpt_runtime.models.weights import file_digest, read_state_dict

CONFIG_NAME = "open_clip_config.json"
_HUB_PREFIX = "hf-hub:"
_LOCAL_PREFIX = "local-dir:"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_PREFERRED_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color")
_NAMED_AT_MOST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Weights and what is known about them.

    Attributes:
        source: What the user named.
        format: 'open_clip-folder', 'safetensors', 'torch', 'training-checkpoint' or 'pretrained'.
        sha256: Of the weights file.
        size_bytes: Of the weights file.
        model_config: open_clip's `model_cfg`, checked, with every download switched off.
        preprocess: How images become input.
        state_dict: Named as open_clip names them, on the CPU, in the dtype of the file.
        anomalies: Reasons not to use the weights: missing, unexpected or mis-shaped keys, NaN or infinite
            values.
        notes: What was adapted while reading.
        folder: Where further files of the model lie (a local tokenizer), if anywhere.
    """

    source: str
    format: str
    sha256: str
    size_bytes: int
    model_config: dict[str, Any]
    preprocess: Preprocess
    state_dict: dict[str, Tensor]
    anomalies: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    folder: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """Files and settings a source name stands for, before any weight is read.

    Attributes:
        source: What the user named.
        weights: The weights file.
        format: As in `Checkpoint`; None where the content of the weights file says it.
        settings: `model_cfg` and `preprocess_cfg`, not yet checked; None where the architecture is unknown.
        folder: As in `Checkpoint`.
        notes: As in `Checkpoint`.
    """

    source: str
    weights: Path
    format: str | None = None
    settings: Mapping[str, Any] | None = None
    folder: Path | None = None
    notes: tuple[str, ...] = ()


def read_checkpoint(source: str | Path, *, model: str | Path | None = None) -> Checkpoint:
    """Reads a suspect checkpoint without executing anything from it.

    Args:
        source: An open_clip folder; a .safetensors, .pt or .bin file with a state dict or a training
            checkpoint; an open_clip pretrained tag (with `model`); or 'hf-hub:owner/name'. A path never uses
            the network.
        model: An open_clip architecture name or a JSON configuration file. Needed for a bare weights file.

    Raises:
        CheckpointError: The source is missing, damaged, in no known format, wants to run code, or its
            configuration is not one of a dual encoder.
    """
    located = locate(source, model=model)
    if located.settings is None:
        raise CheckpointError(
            expected=f"the architecture of {located.source}",
            got=f"a weights file without {CONFIG_NAME} beside it",
            fix="Name it: --model ViT-B-32 (any open_clip architecture) or --model config.json.",
        )
    config = check_model_config(located.settings["model_cfg"])
    preprocess = _preprocess(located.settings.get("preprocess_cfg"), config)
    sha256, size_bytes = file_digest(located.weights), located.weights.stat().st_size
    tensors, file_format = read_state_dict(located.weights)
    skeleton = build_model(config, device="meta", folder=located.folder)
    tensors, notes = _adapted(tensors, skeleton)
    expected = skeleton.state_dict()
    return Checkpoint(
        source=located.source,
        format=located.format or file_format,
        sha256=sha256,
        size_bytes=size_bytes,
        model_config=config,
        preprocess=preprocess,
        state_dict=tensors,
        anomalies=(*key_problems(tensors, expected), *value_problems(tensors)),
        notes=(*located.notes, *notes),
        folder=located.folder,
    )


def locate(source: str | Path, *, model: str | Path | None = None) -> Located:
    """Finds the files a source name stands for; downloads them where the name asks for that.

    Raises:
        CheckpointError: Nothing there, or the configuration cannot be read.
    """
    name = str(source).removeprefix(_LOCAL_PREFIX)
    given = None if model is None else _named_settings(model)
    if name.startswith(_HUB_PREFIX):
        config_path, weights = fetch_hub_model(name.removeprefix(_HUB_PREFIX))
        return Located(
            source=name, weights=weights, format="pretrained", settings=given or _settings_file(config_path),
            folder=config_path.parent,
        )  # fmt: skip
    path = Path(name)
    try:
        if path.is_dir():
            return _locate_folder(path, given)
        if path.is_file():
            beside = path.parent / CONFIG_NAME
            settings = given or (_settings_file(beside) if beside.is_file() else None)
            return Located(source=name, weights=path, settings=settings, folder=path.parent)
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise CheckpointError(
            expected=f"a readable checkpoint {name:.300}", got=reason, fix="Check the path and its mode."
        ) from error
    return _locate_tag(name, model)


def key_problems(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    """Says which weights are missing, unknown to the architecture, or of another shape or kind of number."""
    # torch fills in this counter of batch norm; some converters leave it out.
    missing = [key for key in expected if key not in tensors and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in tensors if key not in expected]
    misshaped = [
        f"{key} {list(tensors[key].shape)} instead of {list(weight.shape)}"
        for key, weight in expected.items()
        if key in tensors and tensors[key].shape != weight.shape
    ]
    integers = [
        key
        for key, weight in expected.items()
        if key in tensors and weight.is_floating_point() and not tensors[key].is_floating_point()
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped, "of integers": integers}
    for kind, keys in kinds.items():
        if keys:
            yield f"{len(keys)} weights {kind}: {first_few(keys)}"


def value_problems(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Says which weights hold NaN or infinite values."""
    broken = [key for key, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        yield f"{len(broken)} weights with NaN or infinite values: {first_few(broken)}"


def first_few(names: list[str]) -> str:
    """At most five names, and how many more there are."""
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    wide = tensor if tensor.element_size() > 1 else tensor.float()  # 8-bit floats have no isfinite
    return bool(torch.isfinite(wide).all())


def _locate_folder(folder: Path, given: Mapping[str, Any] | None) -> Located:
    config_path = folder / CONFIG_NAME
    if given is None and not config_path.is_file():
        raise CheckpointError(
            expected=f"{CONFIG_NAME} in {folder}",
            got="a folder without it",
            fix="Name an open_clip folder or a weights file, or give the architecture with --model.",
        )
    candidates = sorted(
        path for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES and path.is_file()
    )
    preferred = [folder / name for name in _PREFERRED_WEIGHTS if folder / name in candidates]
    if not preferred and len(candidates) != 1:
        raise CheckpointError(
            expected=f"{_PREFERRED_WEIGHTS[0]} in {folder}",
            got=first_few([path.name for path in candidates]) or "no weights file",
            fix="Add the weights file, or name the one to use instead of the folder.",
        )
    settings = given or _settings_file(config_path)
    weights = (preferred or candidates)[0]
    return Located(
        source=str(folder), weights=weights, format="open_clip-folder", settings=settings, folder=folder
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
    return Located(source=name, weights=weights, format="pretrained", settings=settings, notes=notes)


def _named_settings(model: str | Path) -> Mapping[str, Any]:
    """Settings for --model: a configuration file, or the name of an open_clip architecture."""
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
    """The preprocessing all published weights of an architecture share; open_clip's default otherwise."""
    found = [
        _known_preprocess(open_clip.get_pretrained_cfg(architecture, tag))
        for tag in open_clip.list_pretrained_tags_by_model(architecture)
    ]
    return found[0] if found and all(entry == found[0] for entry in found) else {}


def _known_preprocess(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in _PREPROCESS_KEYS if key in settings}


def _preprocess(settings: Mapping[str, Any] | None, config: Mapping[str, Any]) -> Preprocess:
    try:
        return Preprocess.from_open_clip(settings or {}, config["vision_cfg"].get("image_size", 224))
    except ConfigError as error:
        raise CheckpointError(
            expected=error.expected, got=error.got, fix=f"Correct {CONFIG_NAME}."
        ) from error


def _adapted(tensors: dict[str, Tensor], skeleton: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Older and third-party names and shapes brought to the present ones, as open_clip's own loader does.

    Nothing is interpolated: position embeddings of another length are another architecture.
    """
    notes = []
    try:
        tensors = dict(convert_state_dict(skeleton, tensors))
    except (LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            expected="the weights of a MobileCLIP, as some of their names say",
            got=f"others ({type(error).__name__}: {error})",
            fix="Name the architecture the weights were trained with (--model).",
        ) from error
    if "positional_embedding" in tensors and not hasattr(skeleton, "positional_embedding"):
        tensors = convert_to_custom_text_state_dict(tensors)
    tensors.pop("text.transformer.embeddings.position_ids", None)  # written by transformers before 4.31
    for key in ("logit_scale", "logit_bias"):
        parameter = getattr(skeleton, key, None)
        if parameter is not None and key in tensors and tensors[key].numel() == 1:
            tensors[key] = tensors[key].reshape(parameter.shape)
    if skeleton.logit_bias is not None and "logit_scale" in tensors and "logit_bias" not in tensors:
        tensors["logit_bias"] = torch.zeros_like(tensors["logit_scale"])
        notes.append("logit_bias, which the weights lack, set to 0")
    return tensors, tuple(notes)
