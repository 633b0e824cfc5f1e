"""`purify --method`: other defences through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from cbpt_runtime.bundle import read_bundle


def test_the_command_refuses_options_of_another_method(
    run: Callable,
    tiny_checkpoint_folder: Path,
    tiny_class_file: Path,
    tiny_image_folder: Path,
    tmp_path: Path,
) -> None:
    inputs = ("--checkpoint", tiny_checkpoint_folder, "--classes", tiny_class_file)
    arguments = ("purify", *inputs, "--images", tiny_image_folder, "--output", tmp_path / "bundle")
    for option in (("--parameterization", "prompt"), ("--resume",)):
        refused = run(*arguments, "--method", "ft", *option)
        assert refused.code == 2
        assert f"{option[0]} with --method cbpt" in refused.err
    config = tmp_path / "config.json"
    config.write_text('{"tuning_steps": 3}')
    refused = run(*arguments, "--method", "rvpt", "--config", config)
    assert refused.code == 2
    assert "keys out of seed" in refused.err
    assert run(*arguments, "--method", "magic").code == 2
    assert not (tmp_path / "bundle").exists()


def test_the_command_makes_a_bundle_with_another_method(
    run: Callable,
    tiny_checkpoint_folder: Path,
    tiny_class_file: Path,
    tiny_image_folder: Path,
    tmp_path: Path,
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"epochs": 1, "batch_size": 8}))
    inputs = ("--checkpoint", tiny_checkpoint_folder, "--classes", tiny_class_file)
    arguments = ("--images", tiny_image_folder, "--output", tmp_path / "bundle", "--config", config)
    made = run("purify", *inputs, *arguments, "--method", "ft", "--shots", 4, "--seed", 3)
    assert made.code == 0
    assert "unknown" in made.out
    config = read_bundle(tmp_path / "bundle").manifest["method"]["config"]
    assert (config["epochs"], config["seed"]) == (1, 3)
