"""The gateway's nginx.conf: parsed, and its locations tried as nginx chooses them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crossplane
import pytest
import yaml

SERVER = Path(__file__).parents[2] / "server"
FILE = SERVER / "gateway" / "nginx.conf"


@pytest.fixture(scope="module")
def config() -> list[dict[str, Any]]:
    parsed = crossplane.parse(str(FILE), strict=True)
    # `http2` became a directive of its own in nginx 1.25.1, after this parser's list was made.
    assert [e for e in parsed["errors"] if 'unknown directive "http2"' not in e["error"]] == []
    return parsed["config"][0]["parsed"]  # type: ignore[no-any-return]


def walk(block: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for directive in block:
        yield directive
        yield from walk(directive.get("block", []))


def arguments(config: list[dict[str, Any]], name: str) -> list[list[str]]:
    return [directive["args"] for directive in walk(config) if directive["directive"] == name]


def choose(config: list[dict[str, Any]], path: str) -> dict[str, Any]:
    """The location nginx takes: the first regular expression that fits, else the prefix."""
    locations = [directive for directive in walk(config) if directive["directive"] == "location"]
    for location in locations:
        if location["args"][0] == "~" and re.search(location["args"][1], path):
            return location
    return next(location for location in locations if location["args"] == ["/"])


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/v2/health/live", "GET"),
        ("/v2/health/ready", "GET"),
        ("/v2/models/clip", "GET"),
        ("/v2/models/clip/ready", "GET"),
        ("/v2/models/clip/config", "GET"),
        ("/v2/models/clip/infer", "POST"),
    ],
)
def test_lets_questions_through_by_their_method_only(
    config: list[dict[str, Any]], path: str, method: str
) -> None:
    block = choose(config, path)["block"]
    assert arguments(block, "limit_except") == [[method]]
    assert arguments(block, "deny") == [["all"]]
    assert arguments(block, "proxy_pass") == [["http://triton_http"]]


@pytest.mark.parametrize("name", ["ServerReady", "ModelMetadata", "ModelConfig", "ModelInfer"])
def test_lets_grpc_questions_through(config: list[dict[str, Any]], name: str) -> None:
    block = choose(config, f"/inference.GRPCInferenceService/{name}")["block"]
    assert arguments(block, "grpc_pass") == [["grpc://triton_grpc"]]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/metrics",
        "/v2",
        "/v2/repository/index",
        "/v2/repository/models/clip/load",
        "/v2/models/clip/stats",
        "/v2/models/stats/x",
        "/v2/models/clip/trace/setting",
        "/v2/models/clip/generate",
        "/v2/models/clip/versions/1/infer",
        "/v2/models/../repository/index",
        "/v2/models/clip/infer/x",
        "/v2/systemsharedmemory/region/a/register",
        "/v2/cudasharedmemory/status",
        "/v2/logging",
        "/v2/trace/setting",
        "/x/v2/health/live",
        "/inference.GRPCInferenceService/RepositoryModelLoad",
        "/inference.GRPCInferenceService/SystemSharedMemoryRegister",
        "/inference.GRPCInferenceService/ModelStatistics",
        "/inference.GRPCInferenceService/ModelInferX",
        "/inferenceXGRPCInferenceService/ModelInfer",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    ],
)
def test_lets_nothing_else_through(config: list[dict[str, Any]], path: str) -> None:
    block = choose(config, path)["block"]
    assert arguments(block, "return")[0][0] == "404"
    assert not arguments(block, "proxy_pass") + arguments(block, "grpc_pass")


def test_a_compressed_body_gets_through_nowhere(config: list[dict[str, Any]]) -> None:
    """1.5 MB of gzip may be 1.5 GB in Triton. A gRPC message has a header of its own that says so."""
    ways = [d for d in walk(config) if d["directive"] in ("proxy_pass", "grpc_pass")]
    places = [
        d for d in walk(config) if d["directive"] == "location" and any(way in d["block"] for way in ways)
    ]
    assert len(places) == len(ways) == 4
    for place in places:
        refused = {
            tuple(d["args"]) for d in place["block"] if d["directive"] == "if" and returns(d) == ["415"]
        }
        assert ("$http_content_encoding", "!=", "") in refused
        if arguments(place["block"], "grpc_pass"):
            assert ("$http_grpc_encoding", "!~", "^(identity)?$") in refused
    assert ["Content-Encoding", ""] in arguments(config, "proxy_set_header")
    assert ["Grpc-Encoding", ""] in arguments(config, "grpc_set_header")


def returns(condition: dict[str, Any]) -> list[str]:
    (only,) = condition["block"]
    assert only["directive"] == "return"
    return list(only["args"])


def test_every_listener_speaks_tls_and_asks_for_a_password(config: list[dict[str, Any]]) -> None:
    assert arguments(config, "listen") == [["8443", "ssl"]]
    assert set(arguments(config, "ssl_protocols")[0]) == {"TLSv1.2", "TLSv1.3"}
    open_places = [
        d["args"]
        for d in walk(config)
        if d["directive"] == "location" and ["off"] in arguments(d["block"], "auth_basic")
    ]
    assert arguments(config, "auth_basic")[0] == ["Triton"]
    assert open_places == [["=", "/refused"]]
    assert arguments(config, "internal") == [[]]  # nobody can ask for it
    assert ["Authorization", ""] in arguments(config, "proxy_set_header")
    assert arguments(config, "client_max_body_size")[0] == ["64m"]


def test_upstreams_are_services_of_the_compose_file(config: list[dict[str, Any]]) -> None:
    services = yaml.safe_load((SERVER / "compose.yaml").read_text())["services"]
    servers = [args[0] for args in arguments(config, "server") if args]
    assert {address.split(":")[0] for address in servers} <= set(services)
    assert sorted(address.split(":")[1] for address in servers) == ["8000", "8001"]


def test_what_it_writes_is_on_the_only_writable_place(config: list[dict[str, Any]]) -> None:
    places = [arguments(config, name)[0][0] for name in ("pid", "proxy_temp_path", "client_body_temp_path")]
    assert all(place.startswith("/tmp/") for place in places)
    assert "/tmp:" in yaml.safe_load((SERVER / "compose.yaml").read_text())["services"]["gateway"]["tmpfs"][0]


def test_refusals_are_in_tritons_form_and_small_pictures_stay_off_the_disk(
    config: list[dict[str, Any]],
) -> None:
    (*statuses, page) = arguments(config, "error_page")[0]
    place = next(d for d in walk(config) if d["directive"] == "location" and d["args"] == ["=", page])
    (status, text) = arguments(place["block"], "return")[0]
    assert status == "200"  # nginx keeps the one it refused with
    message = json.loads(text)["error"]
    assert all(status in message for status in statuses)
    assert arguments(place["block"], "client_max_body_size") == [["0"]]  # or a large one is refused twice
    assert arguments(config, "client_body_buffer_size") == [["1m"]]
