from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from cbpt_runtime.__main__ import main
from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.checkpoint import read_checkpoint

pytestmark = pytest.mark.usefixtures("no_network")
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def folder(tiny_checkpoint_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint_folder, tmp_path / "model"))


def test_a_name_behind_the_path_chooses_among_sets_of_weights(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    averaged = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    (folder / WEIGHTS).unlink()
    torch.save({"state_dict": state, "state_dict_ema": averaged}, folder / "epoch_1.pt")
    plain = read_checkpoint(folder)
    for source in (f"{folder}#state_dict_ema", f"{folder / 'epoch_1.pt'}#state_dict_ema"):
        checkpoint = read_checkpoint(source)
        assert (checkpoint.source, checkpoint.weights_name) == (source, "state_dict_ema")
        assert checkpoint.anomalies == ()
        assert torch.equal(checkpoint.state_dict["visual.proj"], plain.state_dict["visual.proj"] + 1)


def test_a_path_with_the_mark_in_its_name_is_a_path(folder: Path) -> None:
    moved = folder.rename(folder.with_name("run#3"))
    assert read_checkpoint(moved).anomalies == ()


def test_what_trainers_write_beside_the_weights_is_no_second_candidate(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "weights.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"a": 1}, folder / name)
    assert read_checkpoint(folder).anomalies == ()


def test_an_open_clip_configuration_goes_before_one_of_transformers(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert read_checkpoint(folder).format == "open_clip-folder"


@pytest.mark.filterwarnings("ignore")  # torch remarks that no process group is set up
def test_a_distributed_checkpoint_is_named_and_the_way_out_too(tmp_path: Path, folder: Path) -> None:
    dcp.save({"model": load_file(folder / WEIGHTS)}, checkpoint_id=tmp_path / "distributed", no_dist=True)
    part = next((tmp_path / "distributed").glob("*.distcp"))
    for source in (tmp_path / "distributed", part):
        with pytest.raises(CheckpointError, match=r"a distributed checkpoint \(DCP\).*dcp_to_torch"):
            read_checkpoint(source)


def test_a_deepspeed_folder_is_named_and_the_way_out_too(tmp_path: Path) -> None:
    (tmp_path / "global_step7").mkdir()
    torch.save({}, tmp_path / "global_step7" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match=r"a DeepSpeed checkpoint.*zero_to_fp32\.py"):
        read_checkpoint(tmp_path)


def test_an_adapter_folder_is_named_and_the_way_out_too(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a.lora_A.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"an adapter \(LoRA\).*merge_and_unload"):
        read_checkpoint(tmp_path)


def test_the_command_line_inspects_the_weights_a_name_chooses(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(folder / WEIGHTS)
    torch.save({"model": state, "ema": state}, folder / "epoch.pt")
    (folder / WEIGHTS).unlink()
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["inspect", f"{folder}#ema", "--json"])
    assert "weights read from ema" in json.loads(capsys.readouterr().out)["notes"]
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["inspect", f"{folder}#emma"])
    assert "got model, ema" in " ".join(capsys.readouterr().err.split())


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("reference", sorted(set(re.findall(r"`(tests/\S+::\w+)`", PAGE))))
def test_the_page_of_layouts_names_tests_that_exist(reference: str) -> None:
    path, name = reference.split("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_every_row_of_the_page_of_layouts_names_its_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and "---" not in line]
    headings = [line for line in rows if line.endswith("| test |")]
    assert all("`tests/" in line for line in rows if line not in headings)
    assert len(headings) == 4
