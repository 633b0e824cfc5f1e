from __future__ import annotations

from typing import Any

import pytest

from cbpt_runtime.errors import ConfigError
from cbpt_runtime.purification.config import PurifyConfig


def test_a_configuration_survives_the_round_trip() -> None:
    config = PurifyConfig(seed=3, parameterization="embedding", backdoor_weight=1)
    assert PurifyConfig.from_dict(config.to_dict()) == config


def test_unknown_keys_are_errors_that_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"seed.*got sead"):
        PurifyConfig.from_dict({"sead": 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("parameterization", "weights"),
        ("precision", "fp64"),
        ("seed", -1),
        ("seed", True),
        ("search_steps", 0),
        ("search_concepts", 7),
        ("search_batch", 1.5),
        ("suspect_p_value", 0.0),
        ("backdoor_weight", float("nan")),
        ("backdoor_weight", float("inf")),
        ("max_trigger_success", 1.5),
        ("tuning_step_size", "fast"),
    ],
)
def test_bad_values_are_errors_that_name_the_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        PurifyConfig.from_dict({key: value})
