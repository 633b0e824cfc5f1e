from __future__ import annotations

from cbpt_runtime.models.clip import DualEncoder


def test_encoder(tiny_encoder: DualEncoder) -> None:
    assert tiny_encoder.embed_dim == 16
