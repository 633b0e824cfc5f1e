"""A checkpoint that Lightning's own Trainer writes, read back (the extra `writers`)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cbpt_runtime.models.architecture import build_model
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import load_dual_encoder
from cbpt_runtime.models.config import check_model_config

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages it imports
    lightning: Any = pytest.importorskip(
        "pytorch_lightning", reason="WRITERS NOT TESTED: the extra `writers`"
    )
pytestmark = [
    pytest.mark.usefixtures("no_network"),
    pytest.mark.filterwarnings("ignore"),  # Lightning advises on GPUs, workers and loggers
]
SIDE = 32


class Contrastive(lightning.LightningModule):  # type: ignore[misc]
    """CLIP's own loss over a tiny model, with settings of the kinds people keep."""

    def __init__(self, config: Mapping[str, Any], rate: np.float64, data: Path, optimizer: type) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = build_model(check_model_config(config))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        images, tokens = batch
        found = self.model(images, tokens)
        image, text, scale = (
            (found["image_features"], found["text_features"], found["logit_scale"])
            if isinstance(found, dict)
            else found[:3]
        )
        loss = torch.nn.functional.cross_entropy(scale * image @ text.T, torch.arange(len(images)))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.hparams.optimizer(self.parameters(), lr=float(self.hparams.rate))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


@pytest.fixture
def trained(tiny_configs: dict[str, Any], tmp_path: Path) -> tuple[Contrastive, Path]:
    """A module after two steps, and the checkpoint its trainer wrote."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Contrastive(tiny_configs["vit"], np.float64(1e-3), tmp_path / "data", torch.optim.AdamW)
        images, tokens = torch.rand(4, 3, SIDE, SIDE), torch.randint(1, 49000, (4, 16))
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, tokens), batch_size=2)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[
                lightning.callbacks.ModelCheckpoint(
                    dirpath=tmp_path / "kept", monitor="loss", save_last=True
                ),
                lightning.callbacks.EarlyStopping("loss", check_on_train_epoch_end=True),
            ],
        )
        trainer.fit(module, loader)
    return module.eval(), tmp_path / "kept" / "last.ckpt"


@torch.no_grad()
def test_what_lightnings_trainer_writes_gives_the_same_features(
    trained: tuple[Contrastive, Path], tmp_path: Path, tiny_configs: dict[str, Any]
) -> None:
    module, path = trained
    written = torch.load(path, weights_only=False)
    assert {"callbacks", "hyper_parameters", "optimizer_states", "lr_schedulers", "loops"} <= set(written)
    assert all(name.startswith("model.") for name in written["state_dict"])
    (tmp_path / "tiny.json").write_text(json.dumps({"model_cfg": tiny_configs["vit"]}))
    checkpoint = read_checkpoint(path, model=str(tmp_path / "tiny.json"))
    assert checkpoint.anomalies == ()
    notes = "\n".join(checkpoint.notes)
    assert "weights read from state_dict" in notes
    beside = next(note for note in checkpoint.notes if note.startswith("not used, beside them: "))
    assert set(beside.removeprefix("not used, beside them: ").split(", ")) == set(written) - {"state_dict"}
    (left_out,) = (note for note in checkpoint.notes if note.startswith("left out, and nothing of them run"))
    assert "multiarray.scalar" in left_out
    assert "pathlib.PosixPath" in left_out
    assert "prefix model. removed" in notes
    pixels = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    encoder = load_dual_encoder(checkpoint).image_encoder
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (encoder.preprocess.mean, encoder.preprocess.std)
    )
    expected = module.model.encode_image((pixels - mean) / std, normalize=True)
    torch.testing.assert_close(encoder.encode_images(pixels), expected, atol=1e-5, rtol=0)
