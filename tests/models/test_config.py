from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.config import check_model_config, is_custom_text, read_json

BASE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 2},
}
ARCHITECTURES = open_clip.list_models()


def changed(path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(BASE)
    *sections, key = path.split(".")
    section = config
    for name in sections:
        section = section[name]
    section[key] = value
    return config


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_built_in_architecture_passes_except_captioning_models(name: str) -> None:
    config = open_clip.get_model_config(name)
    if "multimodal_cfg" in config:
        with pytest.raises(CheckpointError, match="a CoCa captioning model"):
            check_model_config(config)
    else:
        checked = check_model_config(config)
        assert is_custom_text(checked) == ("custom_text" in config or "hf_model_name" in config["text_cfg"])


def test_downloads_are_switched_off_and_the_original_is_left_alone() -> None:
    config = changed("vision_cfg.timm_model_pretrained", True)
    config["text_cfg"]["hf_model_pretrained"] = True
    original = copy.deepcopy(config)
    checked = check_model_config(config)
    assert checked["vision_cfg"]["timm_model_pretrained"] is False
    assert checked["text_cfg"]["hf_model_pretrained"] is False
    assert config == original
    assert check_model_config(checked) == checked


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:someone/model",
        "hf_hub:someone/model",
        "local-dir:/tmp",
        "../resnet18",
        "",
        "os",
        3,
        ["resnet18"],
    ],
)
def test_image_towers_from_outside_timm_are_refused(name: Any) -> None:
    with pytest.raises(CheckpointError, match="timm_model_name"):
        check_model_config(changed("vision_cfg.timm_model_name", name))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("surprise", 1, r"only keys open_clip .* knows in model_cfg; got surprise"),
        ("vision_cfg.surprise", 1, r"knows in vision_cfg; got surprise"),
        ("text_cfg.surprise", 1, r"knows in text_cfg; got surprise"),
        ("text_cfg.tokenizer_kwargs", {"bpe_path": "/dev/zero"}, r"text_cfg.tokenizer_kwargs; got bpe_path"),
        ("text_cfg.tokenizer_kwargs", {"reduction_mask": "syntax"}, r"tokenizer_kwargs; got reduction_mask"),
        (
            "text_cfg.tokenizer_kwargs",
            {"clean": "eval"},
            r"clean out of lower, canonicalize, whitespace; got 'eval'",
        ),
        ("text_cfg.tokenizer_kwargs", "clean", "tokenizer_kwargs of type dict"),
        ("vision_cfg.norm_kwargs", {"device": "cuda"}, "norm_kwargs; got device"),
        ("vision_cfg.norm_kwargs", {"eps": "small"}, "norm_kwargs.eps of type float"),
        ("vision_cfg.act_kwargs", {"approximate": "exec"}, "approximate out of none, tanh"),
        ("embed_dim", "16", "embed_dim of type int"),
        ("embed_dim", True, "embed_dim of type int"),
        ("embed_dim", 10**9, "embed_dim above 0 and at most 16,384"),
        ("vision_cfg.head_width", 16 / 3, "head_width above 0 and at most 1,024, a whole number; got 5.3"),
        ("embed_dim", 0, "embed_dim above 0"),
        ("embed_dim", None, "expected embed_dim in model_cfg"),
        ("quick_gelu", "yes", "quick_gelu of type bool"),
        ("vision_cfg", [], "vision_cfg of type dict"),
        ("vision_cfg", None, "expected vision_cfg in model_cfg"),
        ("vision_cfg.layers", 10**6, "vision_cfg.layers above 0 and at most 256"),
        ("vision_cfg.layers", [1, 1, 1], "one or four numbers"),
        ("vision_cfg.layers", [1, 1, 1, -1], "vision_cfg.layers above 0"),
        ("vision_cfg.width", float("nan"), "vision_cfg.width above 0"),
        ("vision_cfg.image_size", "32", "vision_cfg.image_size above 0"),
        ("vision_cfg.patch_dropout", "lots", "patch_dropout of type float"),
        ("vision_cfg.ls_init_value", [1], "a single value"),
        ("text_cfg.heads", 0, "text_cfg.heads above 0"),
        ("text_cfg.context_length", 10**9, "context_length above 0 and at most 4,096"),
        ("text_cfg.vocab_size", -1, "vocab_size above 0"),
        ("text_cfg.pool_type", "none", "pool_type out of first, last, argmax, eos; got 'none'"),
        ("text_cfg.pool_type", 3, "pool_type"),
        ("text_cfg.embed_cls", True, "custom_text true beside embed_cls"),
        ("multimodal_cfg", {}, "CoCa captioning model"),
    ],
)
def test_configurations_that_are_wrong_or_hostile_are_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_model_config(changed(path, value))


@pytest.mark.parametrize("key", ["embed_dim", "vision_cfg", "text_cfg"])
def test_missing_sections_are_named(key: str) -> None:
    config = copy.deepcopy(BASE)
    del config[key]
    with pytest.raises(CheckpointError, match=f"expected {key} in model_cfg"):
        check_model_config(config)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PATHS = [
    "embed_dim", "vision_cfg", "text_cfg", "custom_text", "init_logit_bias", "vision_cfg.layers",
    "vision_cfg.width", "vision_cfg.timm_model_name", "text_cfg.pool_type", "text_cfg.tokenizer_kwargs",
    "text_cfg.hf_model_name",
]  # fmt: skip


@given(path=st.sampled_from(PATHS), value=JSON_VALUES)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_value_anywhere_passes_or_gives_a_checkpoint_error(path: str, value: Any) -> None:
    with suppress(CheckpointError):
        check_model_config(changed(path, value))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file"),
        (b'{"model_cfg": {"embed', "valid JSON"),
        (b"[1, 2]", "a JSON object in .*; got list"),
        (b"\xff\xfe\x00", "valid JSON"),
        (b"[" * 100_000, "valid JSON"),
        (b" " * 1_000_001, "at most 1,000,000 bytes"),
    ],
)
def test_damaged_json_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_json(path)


def test_json_is_read_and_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(BASE))
    assert read_json(path) == BASE
    with pytest.raises(CheckpointError, match=r"absent\.json; got no such file"):
        read_json(tmp_path / "absent.json")
