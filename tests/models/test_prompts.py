from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from cbpt_runtime.errors import CheckpointError, ClassListError, ConfigError
from cbpt_runtime.models.architecture import build_model
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import DualEncoder, load_dual_encoder
from cbpt_runtime.models.config import check_model_config
from cbpt_runtime.models.prompts import PromptEncoder
from cbpt_runtime.models.tokenizer import Tokenizer

NAMES = ("tench", "golden_retriever", "Space shuttle", "x", "an image of many words")


@pytest.fixture(params=["vit", "custom-text", "siglip"])
def encoder(request: pytest.FixtureRequest, tiny_folder: Callable[..., Path]) -> DualEncoder:
    return load_dual_encoder(read_checkpoint(tiny_folder(request.param)))


def with_text(config: dict[str, Any], preprocess: Any, **text_cfg: Any) -> DualEncoder:
    config = {**config, "text_cfg": {**config["text_cfg"], **text_cfg}}
    torch.manual_seed(0)
    model = build_model(check_model_config(config))
    return DualEncoder(model, config, preprocess, Tokenizer(config["text_cfg"]))


def untruncated(encoder: DualEncoder, contexts: torch.Tensor) -> torch.Tensor:
    """The same prompts over the tower's full context, spliced by hand and run through open_clip's modules."""
    model: Any = encoder.text_tower.model
    tower = getattr(model, "text", model)
    n_context = contexts.shape[1]
    tokens = encoder.tokenizer([f"{'x ' * n_context}{name.replace('_', ' ')}" for name in NAMES])
    embeddings = tower.token_embedding(tokens)
    embeddings[:, 1 : 1 + n_context] = contexts
    x = tower.transformer(embeddings + tower.positional_embedding, attn_mask=tower.attn_mask)
    x = tower.ln_final(x)
    is_last = getattr(tower, "pool_type", "argmax") == "last"
    x = x[:, -1] if is_last else x[torch.arange(len(x)), tokens.argmax(dim=-1)]
    projection = tower.text_projection
    return normalize(projection(x) if callable(projection) else x @ projection, dim=-1)


def test_the_initial_contexts_give_the_embeddings_of_the_initial_text(encoder: DualEncoder) -> None:
    prompts = PromptEncoder(encoder, NAMES, init="a photo of a")
    expected = encoder.encode_texts([f"a photo of a {name.replace('_', ' ')}" for name in NAMES])
    torch.testing.assert_close(prompts.encode(prompts.initial_contexts()), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("context_length", [1, 4, 7])
def test_truncation_changes_neither_the_embeddings_nor_the_argmax(
    encoder: DualEncoder, context_length: int
) -> None:
    prompts = PromptEncoder(encoder, NAMES, context_length=context_length)
    generator = torch.Generator().manual_seed(context_length)
    contexts = torch.randn(prompts.initial_contexts().shape, generator=generator)
    embeddings, expected = prompts.encode(contexts), untruncated(encoder, contexts)
    torch.testing.assert_close(embeddings, expected, atol=1e-6, rtol=1e-5)
    features = normalize(torch.randn(500, encoder.embed_dim, generator=generator), dim=-1)
    assert torch.equal((features @ embeddings.T).argmax(dim=1), (features @ expected.T).argmax(dim=1))
    assert prompts.length == (1 + context_length + 5 + 1 if encoder.text_tower.is_causal else 16)


def test_gradients_are_those_of_the_untruncated_prompts(encoder: DualEncoder) -> None:
    prompts = PromptEncoder(encoder, NAMES)
    weights = torch.randn(len(NAMES), encoder.embed_dim, generator=torch.Generator().manual_seed(0))
    contexts = prompts.initial_contexts().requires_grad_()
    (gradient,) = torch.autograd.grad((prompts.encode(contexts) * weights).sum(), contexts)
    (expected,) = torch.autograd.grad((untruncated(encoder, contexts) * weights).sum(), contexts)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
    assert gradient.abs().sum(dim=(1, 2)).min() > 0


def test_each_class_depends_on_its_own_context_only(tiny_encoder: DualEncoder) -> None:
    prompts = PromptEncoder(tiny_encoder, NAMES)
    contexts = prompts.initial_contexts().requires_grad_()
    (gradient,) = torch.autograd.grad(prompts.encode(contexts)[2, 0], contexts)
    assert gradient.abs().sum(dim=(1, 2)).nonzero().flatten().tolist() == [2]


def test_initial_contexts_are_fresh_copies_of_the_words(tiny_encoder: DualEncoder) -> None:
    prompts = PromptEncoder(tiny_encoder, NAMES, context_length=5, init="a photo")
    first = prompts.initial_contexts()
    assert first.shape == (len(NAMES), 5, 32)
    torch.testing.assert_close(first[:, 0], first[:, 2])
    torch.testing.assert_close(first[:, 1], first[:, 3])
    first.zero_()
    assert prompts.initial_contexts().abs().sum() > 0


def test_an_initial_text_longer_than_the_context_is_cut(tiny_encoder: DualEncoder) -> None:
    short, long = (
        PromptEncoder(tiny_encoder, NAMES, context_length=2, init=init)
        for init in ("a photo", "a photo of a")
    )
    torch.testing.assert_close(short.initial_contexts(), long.initial_contexts())


def test_the_model_stays_as_it_is(tiny_encoder: DualEncoder) -> None:
    before = {name: value.clone() for name, value in tiny_encoder.text_tower.model.state_dict().items()}
    prompts = PromptEncoder(tiny_encoder, NAMES)
    contexts = prompts.initial_contexts().requires_grad_()
    torch.autograd.backward(prompts.encode(contexts).sum())
    after = tiny_encoder.text_tower.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in tiny_encoder.text_tower.model.parameters())


@pytest.mark.parametrize("context_length", [0, -1, 14, 100])
def test_a_context_without_room_for_a_name_is_refused(tiny_encoder: DualEncoder, context_length: int) -> None:
    with pytest.raises(ConfigError, match="a context length from 1 to 13"):
        PromptEncoder(tiny_encoder, NAMES, context_length=context_length)
    PromptEncoder(tiny_encoder, ("cat", "dog"), context_length=13)


@pytest.mark.parametrize("init", ["", "   "])
def test_an_empty_initial_text_is_refused(tiny_encoder: DualEncoder, init: str) -> None:
    with pytest.raises(ConfigError, match="words in the initial context"):
        PromptEncoder(tiny_encoder, NAMES, init=init)


def test_names_that_differ_only_beyond_the_context_are_refused(tiny_encoder: DualEncoder) -> None:
    long = "one two three four five six seven eight nine ten eleven"
    with pytest.raises(ClassListError, match="the same to the text tower"):
        PromptEncoder(tiny_encoder, (f"{long} twelve", f"{long} thirteen"))


def test_no_classes_are_refused(tiny_encoder: DualEncoder) -> None:
    with pytest.raises(ClassListError, match="one or more class names"):
        PromptEncoder(tiny_encoder, ())


@pytest.mark.parametrize("text_cfg", [{"embed_cls": True}, {"pool_type": "first"}])
def test_towers_that_cannot_take_contexts_name_the_other_parameterization(
    tiny_encoder: DualEncoder, tiny_configs: dict[str, Any], text_cfg: dict[str, Any]
) -> None:
    encoder = with_text(tiny_configs["custom-text"], tiny_encoder.preprocess, **text_cfg)
    with pytest.raises(CheckpointError, match="--parameterization embedding"):
        PromptEncoder(encoder, NAMES)


@pytest.mark.parametrize(
    "text_cfg",
    [
        {"pool_type": "eos", "eos_id": 49407},
        {"pool_type": "last"},
        {"pool_type": "first", "no_causal_mask": True},
    ],
)
def test_every_other_way_of_pooling_works(
    tiny_encoder: DualEncoder, tiny_configs: dict[str, Any], text_cfg: dict[str, Any]
) -> None:
    for kind in ("vit", "custom-text"):
        encoder = with_text(tiny_configs[kind], tiny_encoder.preprocess, **text_cfg)
        prompts = PromptEncoder(encoder, NAMES)
        expected = encoder.encode_texts([f"a photo of a {name}" for name in NAMES if "_" not in name])
        found = prompts.encode(prompts.initial_contexts())[[0, 2, 3, 4]]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_one_hundred_classes_of_a_victim_take_a_few_milliseconds(shared_data: Path) -> None:
    encoder = load_dual_encoder(read_checkpoint(shared_data / "victims" / "tiny-badnet"))
    prompts = PromptEncoder(encoder, [f"class number {index}" for index in range(100)])
    contexts = prompts.initial_contexts()
    assert prompts.length < 12
    times_s = []
    with torch.no_grad():
        for _ in range(5):
            start = time.perf_counter()
            prompts.encode(contexts)
            times_s.append(time.perf_counter() - start)
    assert min(times_s) < 0.1  # 0.0125 was measured on one busy core; loose, because test machines differ
