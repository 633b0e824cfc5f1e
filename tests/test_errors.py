"""The text of an error, whatever a stranger's file calls itself."""

from __future__ import annotations

import pickle

import pytest

from cbpt_runtime.errors import CheckpointError, ConfigError
from cbpt_runtime.models.config import check_model_config


@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_blank_text_is_quoted(blank: str) -> None:
    error = ConfigError(expected="a key", got=blank, fix="Name one.")
    assert error.got == repr(blank)
    assert pickle.loads(pickle.dumps(error)).got == error.got


def test_endless_text_is_cut() -> None:
    error = ConfigError(expected="x" * 100_000, got="y" * 100_000, fix="Shorten it.")
    assert len(str(error)) < 10_000
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(ConfigError(expected="a", got="b" * 300, fix="c.")) == f"expected a; got {'b' * 300}. c."


def test_an_unknown_empty_key_of_a_configuration_is_named() -> None:
    config = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"": 1}}
    with pytest.raises(CheckpointError, match=r"text_cfg; got ''\."):
        check_model_config(config)
