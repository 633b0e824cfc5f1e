"""Profiles: the shipped ones read, wrong ones say what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from cbpt_runtime.errors import ConfigError
from cbpt_runtime.export.profiles import BUILT_IN, Profile, read_profile

SHIPPED = sorted((Path(__file__).parents[2] / "export" / "profiles").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_profile_reads(path: Path) -> None:
    assert read_profile(path).provider in ("cpu", "cuda", "tensorrt")


def test_the_shipped_profiles_are_the_documented_ones() -> None:
    assert sorted(path.stem for path in SHIPPED) == ["cpu", "cpu-int8", "cuda-fp16", "tensorrt"]


def test_flags_win_over_the_profile() -> None:
    profile = read_profile("cuda", max_batch=3, precision=None)
    assert (profile.max_batch, profile.precision, profile.provider) == (3, "fp32", "cuda")


def test_a_profile_survives_a_round_trip() -> None:
    for profile in BUILT_IN.values():
        assert Profile.from_dict(profile.to_dict()) == profile


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("max_bath = 3", "got max_bath"),
        ("max_batch = 0", "max_batch = 0"),
        ('max_batch = "8"', "max_batch = '8'"),
        ('provider = "tpu"', "provider = 'tpu'"),
        ('precision = "fp8"', "precision = 'fp8'"),
        ('tensorrt_cache = "cache"', "an absolute path"),
        ("max_batch", "a profile out of cpu, cuda, tensorrt"),
    ],
)
def test_a_wrong_profile_is_named(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        read_profile(path)


def test_a_missing_profile_is_named() -> None:
    with pytest.raises(ConfigError, match="got nowhere"):
        read_profile("nowhere")
