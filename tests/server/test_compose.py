"""The compose file: valid, closed to the network, and pointing at files that are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import compose_spec
import pytest
import yaml

SERVER = Path(__file__).parents[2] / "server"
TEXT = re.sub(r"\$\{MODEL_REPOSITORY:\?[^}]*\}", "/srv/models", (SERVER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]


def test_it_is_a_compose_file() -> None:
    project = compose_spec.PyOptions(apply_merge=True).from_yaml(TEXT)
    project.validate()
    assert set(project.service_names()) == {"triton", "prometheus", "grafana", "gateway"}


def test_a_misspelt_key_would_be_noticed() -> None:
    with pytest.raises(ValueError, match="read_onlyy"):
        compose_spec.PyOptions(apply_merge=True).from_yaml(
            TEXT.replace("    build:", "    read_onlyy: true\n    build:")
        )


@pytest.mark.parametrize("name", list(SERVICES))
def test_every_service_is_read_only_without_capabilities(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert not service.get("privileged")
    assert "network_mode" not in service


@pytest.mark.parametrize("name", list(SERVICES))
def test_only_the_gateway_is_reachable_from_elsewhere(name: str) -> None:
    published = SERVICES[name].get("ports", [])
    if name == "gateway":
        assert published == ["8443:8443"]
        assert SERVICES[name]["profiles"] == ["gateway"]
    else:
        assert all(port.startswith("127.0.0.1:") for port in published)


@pytest.mark.parametrize("name", list(SERVICES))
def test_images_are_named_by_release(name: str) -> None:
    image, tag = SERVICES[name]["image"].rsplit(":", 1)
    assert tag != "latest" or image == "cbpt-runtime-server"  # built here


def test_what_is_mounted_exists_and_is_read_only() -> None:
    for service in SERVICES.values():
        for volume in service["volumes"]:
            if isinstance(volume, dict):
                assert volume["read_only"] is True
            elif volume.startswith("./"):
                source, _, mode = volume.split(":")
                assert mode == "ro"
                assert (SERVER / source).exists() or source == "./gateway/secrets"  # the operator's own


def test_models_are_where_the_command_looks() -> None:
    command = next(
        line for line in (SERVER / "Dockerfile").read_text().splitlines() if line.startswith("CMD")
    )
    assert f'"{SERVICES["triton"]["volumes"][0]["target"]}"' in command


def test_the_container_has_time_to_drain() -> None:
    from cbpt_runtime.serving.config import ServeConfig

    assert int(SERVICES["triton"]["stop_grace_period"].removesuffix("s")) > ServeConfig().drain_timeout_s
