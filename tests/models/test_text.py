from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.architecture import build_model
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import TextTower, load_dual_encoder
from cbpt_runtime.models.config import check_model_config
from cbpt_runtime.models.tokenizer import Tokenizer

TEXTS = [
    "a dog",
    "",
    "a photo of a golden retriever",
    "one two three four five six seven eight nine ten eleven twelve",
]


def tower_and_tokens(config: dict[str, Any], **text_cfg: Any) -> tuple[TextTower, torch.Tensor]:
    config = {**config, "text_cfg": {**config["text_cfg"], **text_cfg}}
    torch.manual_seed(0)
    model = build_model(check_model_config(config)).eval().requires_grad_(False)
    return TextTower.of(model), Tokenizer(config["text_cfg"])(TEXTS)


@pytest.mark.parametrize("kind", ["vit", "custom-text"])
@pytest.mark.parametrize(
    "text_cfg",
    [
        {},
        {"pool_type": "eos", "eos_id": 49407},
        {"pool_type": "last"},
        {"pool_type": "first"},
        {"no_causal_mask": True},
        {"no_causal_mask": True, "pool_type": "first"},
        {"proj_bias": True},
        {"qk_norm": True},
    ],
    ids=str,
)
def test_the_tower_computes_what_open_clip_computes(
    tiny_configs: dict[str, Any], kind: str, text_cfg: dict[str, Any]
) -> None:
    tower, tokens = tower_and_tokens(tiny_configs[kind], **text_cfg)
    assert tower.takes_embeddings
    model: Any = tower.model
    for batch in (tokens, tokens[:1], tokens[1:3]):
        torch.testing.assert_close(tower.encode(batch), model.encode_text(batch), atol=1e-5, rtol=1e-5)


def test_a_tower_without_projection_is_supported(tiny_configs: dict[str, Any]) -> None:
    config = {**tiny_configs["custom-text"], "embed_dim": 32}
    tower, tokens = tower_and_tokens(config, proj_type="none")
    model: Any = tower.model
    torch.testing.assert_close(tower.encode(tokens), model.encode_text(tokens))


def test_only_causal_towers_that_pool_before_the_end_are_cut(tiny_configs: dict[str, Any]) -> None:
    cases: list[tuple[dict[str, Any], int]] = [
        ({}, 8),
        ({"pool_type": "eos", "eos_id": 49407}, 8),
        ({"pool_type": "last"}, 16),
        ({"no_causal_mask": True}, 16),
        ({"pool_type": "first"}, 1),
    ]
    for text_cfg, length in cases:
        tower, tokens = tower_and_tokens(tiny_configs["custom-text"], **text_cfg)
        assert tower.needed_length(tokens[:3]) == length, text_cfg
        assert tower.is_causal is not text_cfg.get("no_causal_mask", False)


def test_the_positions_that_are_cut_have_no_influence(tiny_configs: dict[str, Any]) -> None:
    for kind in ("vit", "custom-text"):
        tower, tokens = tower_and_tokens(tiny_configs[kind])
        full = tower.encode_embeddings(tower.embed(tokens), tokens)
        torch.testing.assert_close(tower.encode(tokens), full, atol=1e-6, rtol=1e-5)
        disturbed = tower.embed(tokens)
        disturbed[:3, 8:] = 100.0
        torch.testing.assert_close(
            tower.encode_embeddings(disturbed, tokens)[:3], full[:3], atol=1e-6, rtol=1e-5
        )


def test_a_class_token_tower_takes_whole_rows_only(tiny_configs: dict[str, Any]) -> None:
    tower, tokens = tower_and_tokens(tiny_configs["custom-text"], embed_cls=True)
    model: Any = tower.model
    assert not tower.takes_embeddings
    torch.testing.assert_close(tower.encode(tokens), model.encode_text(tokens))
    with pytest.raises(CheckpointError, match="--parameterization embedding"):
        tower.encode_embeddings(torch.zeros(1, 16, 32), tokens[:1])


@pytest.mark.parametrize("kind", ["vit", "custom-text", "siglip"])
def test_loaded_towers_agree_with_open_clips_own_text_encoder(
    tiny_folder: Callable[..., Path], kind: str
) -> None:
    encoder = load_dual_encoder(read_checkpoint(tiny_folder(kind)))
    tokens = encoder.tokenizer(TEXTS)
    model: Any = encoder.text_tower.model
    torch.testing.assert_close(encoder.text_tower.encode(tokens), model.encode_text(tokens))
