"""Folders that the real libraries write, read back: transformers, peft, accelerate (the extra `writers`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import load_dual_encoder

transformers: Any = pytest.importorskip("transformers", reason="WRITERS NOT TESTED: the extra `writers`")
pytestmark = pytest.mark.usefixtures("no_network")
SIDE = 32


@pytest.fixture
def clip() -> Any:
    """A tiny CLIPModel with random weights."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**tower, "image_size": SIDE, "patch_size": 8}
    text = {**tower, "vocab_size": 49408, "max_position_embeddings": 16, "eos_token_id": 49407}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.CLIPModel(config).eval()


@torch.no_grad()
def require_same_features(folder: Path, model: Any) -> None:
    """Our encoder of the folder against what the model itself says."""
    checkpoint = read_checkpoint(folder)
    assert checkpoint.anomalies == ()
    pixels = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    encoder = load_dual_encoder(checkpoint).image_encoder
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (encoder.preprocess.mean, encoder.preprocess.std)
    )
    vision = model.vision_model(pixel_values=(pixels - mean) / std)
    expected = torch.nn.functional.normalize(model.visual_projection(vision.pooler_output), dim=-1)
    torch.testing.assert_close(encoder.encode_images(pixels), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shard_size", ["1GB", "200KB"])
def test_a_saved_clip_model_gives_the_same_features(clip: Any, tmp_path: Path, shard_size: str) -> None:
    clip.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if shard_size == "1GB" else 2)
    require_same_features(tmp_path, clip)


def test_what_accelerate_saves_beside_the_weights_is_passed_over(clip: Any, tmp_path: Path) -> None:
    accelerate: Any = pytest.importorskip("accelerate", reason="WRITERS NOT TESTED: the extra `writers`")
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(clip.parameters())
    prepared, _ = accelerator.prepare(clip, optimizer)
    accelerator.save_state(str(tmp_path))
    accelerator.unwrap_model(prepared).config.save_pretrained(tmp_path)
    assert (tmp_path / "optimizer.bin").exists()
    require_same_features(tmp_path, clip)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # of transformers, read by peft
def test_a_lora_adapter_is_named_and_a_merged_one_is_read(clip: Any, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft", reason="WRITERS NOT TESTED: the extra `writers`")
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    tuned = peft.get_peft_model(clip, settings)
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"an adapter \(LoRA\).*merge_and_unload"):
        read_checkpoint(tmp_path / "adapter")
    merged = tuned.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    require_same_features(tmp_path / "merged", merged)
