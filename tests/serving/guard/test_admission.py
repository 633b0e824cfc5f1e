"""What is let through to Triton's HTTP, and what is not."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbpt_runtime.serving.guard.admission import (
    MAX_JSON_BYTES,
    Names,
    Refusal,
    is_shallow,
    refuse_body,
    refuse_caller,
    refuse_request,
)

OPEN = Names(is_open=True)
JSON = {"Content-Type": "application/json", "Content-Length": "2"}
INFER = "/v2/models/clip/infer"


def status(refusal: Refusal | None) -> int | None:
    return None if refusal is None else int(refusal.status)


def head(method: str, path: str, **headers: str) -> int | None:
    given = JSON | {name.replace("_", "-"): value for name, value in headers.items()}
    return status(refuse_request(method, path, given, max_body_bytes=1000))


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "127.9.9.9:1", "[::1]:8000", "LOCALHOST."])
def test_the_loopback_may_be_called_by_its_names(host: str) -> None:
    assert refuse_caller({"Host": host}, Names()) is None


FOREIGN = [
    "example.org",
    "127.0.0.1.example.org",
    "localhost.example.org:8000",
    "a.local",
    "",
    "[",
    "[x]",
    "[::1]x",
    "[::1]x:8000",
    "a b",
]


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("names", [Names(), OPEN])
def test_somebody_elses_name_for_this_machine_is_refused(host: str, names: Names) -> None:
    assert status(refuse_caller({"Host": host}, names)) == 403
    assert status(refuse_caller({}, names)) == 403


@pytest.mark.parametrize(
    "host", ["10.1.2.3:8000", "my_triton:8000", "triton.cbpt.svc", "a.b.svc.cluster.local"]
)
def test_addresses_and_internal_names_will_do_only_where_a_network_is_served(host: str) -> None:
    assert refuse_caller({"Host": host}, OPEN) is None
    assert status(refuse_caller({"Host": host}, Names())) == 403


def test_a_name_the_operator_allows_will_do() -> None:
    names = Names(others=frozenset({"clip.example.org"}))
    assert refuse_caller({"Host": "Clip.Example.org:443"}, names) is None
    assert status(refuse_caller({"Host": "clip.example.com"}, names)) == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://example.org"},
        {"Origin": "null"},
        {"Origin": "http://localhost:8080"},
        {"Origin": "https://localhost:8000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_requests_of_other_web_pages_are_refused(headers: dict[str, str]) -> None:
    assert status(refuse_caller({"Host": "localhost:8000"} | headers, Names())) == 403
    own = {"Host": "localhost:8000", "Origin": "http://localhost:8000", "Sec-Fetch-Site": "same-origin"}
    assert refuse_caller(own, Names()) is None


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2"),
        ("GET", "/v2/health/live"),
        ("GET", "/v2/health/ready"),
        ("GET", "/v2/models/clip"),
        ("GET", "/v2/models/clip/config"),
        ("GET", "/v2/models/clip/versions/1/ready"),
        ("GET", "/v2/models/clip/stats"),
        ("GET", "/v2/models/stats"),
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/models/clip/infer"),
        ("POST", "/v2/models/clip/versions/1/infer"),
    ],
)
def test_questions_are_let_through_by_their_method_only(method: str, path: str) -> None:
    assert head(method, path) is None
    assert head({"GET": "POST", "POST": "GET"}[method], path) == 404
    assert head("PUT", path) == head("OPTIONS", path) == head("HEAD", path) == 405


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/metrics",
        "/v2/",
        "/v2/models/clip/infer/",
        "/v2/models/clip/infer?x",
        "/v2/models/clip/generate",
        "/v2/models/cl%69p/infer",
        "/v2/models/a/../b/infer",
        "//v2/models/clip/infer",
        "http://example.org/v2/models/clip/infer",
        "/v2/repository/models/clip/load",
        "/v2/systemsharedmemory/region/a/register",
        "/v2/logging",
        "/v2/trace/setting",
        "/v2/models/clip/infer\n",
    ],
)
def test_no_other_path_is_let_through(path: str) -> None:
    assert head("GET", path) == head("POST", path) == 404


def test_what_is_compressed_is_refused_whatever_it_is() -> None:
    for encoding in ("gzip", "deflate", "br", "identity", ""):
        assert head("POST", INFER, Content_Encoding=encoding) == 415
        assert head("GET", "/v2", Content_Encoding=encoding) == 415


def test_what_a_form_can_send_is_refused() -> None:
    for kind in (
        "text/plain",
        "text/plain;charset=UTF-8",
        "multipart/form-data",
        "application/x-www-form-urlencoded",
    ):
        assert head("POST", INFER, Content_Type=kind) == 415
        assert head("POST", "/v2/repository/index", Content_Type=kind, Content_Length="0") is None
    for kind in ("application/json; charset=utf-8", "Application/Octet-Stream"):
        assert head("POST", INFER, Content_Type=kind) is None
    assert refuse_request("POST", INFER, {"Content-Length": "2"}, max_body_bytes=9) is None


def test_a_body_needs_a_length_within_the_limit() -> None:
    assert head("POST", INFER, Content_Length="1000") is None
    assert head("POST", INFER, Content_Length="1001") == 413
    for length in ("", "-1", "1e3", "0x10", "9" * 13, "²"):
        assert head("POST", INFER, Content_Length=length) == 411
    assert head("POST", INFER, Transfer_Encoding="chunked") == 411


def test_nested_json_is_refused_where_it_is_json_and_nowhere_else() -> None:
    nested = b"[" * 100_000
    text = b'{"inputs": []}'
    assert status(refuse_body(nested, None)) == 400
    assert status(refuse_body(nested, str(len(nested)))) == 400
    assert refuse_body(text + nested, str(len(text))) is None  # an image may have any bytes
    assert status(refuse_body(text + nested, str(len(text) + 50))) == 400
    for length in ("-1", "", "1x", str(len(text) + 1), "9" * 30):
        assert status(refuse_body(text, length)) == 400, length
    assert status(refuse_body(b" " * (MAX_JSON_BYTES + 1), None)) == 413
    assert refuse_body(b" " * (MAX_JSON_BYTES + 1), "0") is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('[]{}\\"ab'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('[]{}\\"a'), inner, max_size=3),
    max_leaves=30,
)


def depth(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@settings(deadline=None, derandomize=True, max_examples=300)
@given(value=VALUES)
def test_depth_is_that_of_the_value_whatever_its_strings_hold(value: Any) -> None:
    text = json.dumps(value).encode()
    assert is_shallow(text, depth(value))
    assert depth(value) == 0 or not is_shallow(text, depth(value) - 1)


@pytest.mark.parametrize(
    "piece", [b'""', b"[]", b'"[', b'"\\"', b"[", b"]", b'"', b"\\", b"0,", b'"shape":[1', b'"\\n" ']
)
def test_the_largest_body_is_judged_in_seconds(piece: bytes) -> None:
    start = time.process_time()
    refuse_body(b"[" * 40 + piece * ((MAX_JSON_BYTES - 40) // len(piece)), None)
    assert time.process_time() - start < 10


def test_numbers_whose_sizes_overflow_are_refused_where_they_are_numbers() -> None:
    for shape in (2**63, 2**63 - 1, 2**32, -(2**63)):
        assert status(refuse_body(b'{"inputs": [{"shape": [%d, 1]}]}' % shape, None)) == 400
    named = b'{"id": "9223372036854775808", "inputs": [{"shape": [999999999, 1]}]}'
    assert refuse_body(named, None) is None
    assert refuse_body(named + b"9" * 20, str(len(named))) is None


@pytest.mark.parametrize(
    "shape",
    ["[0, 1]", "[1, 0]", "[-1]", "[ -0]", "[1,0.0]", "[0e1]", "[01]", "[1, 2", "0", "null", "[[0]]", "[1,]"],
)
def test_a_shape_has_sizes_above_0_however_it_is_written(shape: str) -> None:
    for text in ('{"inputs": [{"shape": %s}]}', '{"shape" :\n\t%s}', '{"shape":[1],"shape":%s}'):
        assert status(refuse_body((text % shape).encode(), None)) == 400
    escaped = r'{"inputs": [{"\u0073hape": [0, 1]}]}'
    assert status(refuse_body(escaped.encode(), None)) == 400
    assert status(refuse_body(rb'{"a": "\"", "shap\u0065"  :[0]}', None)) == 400


@pytest.mark.parametrize(
    "text",
    [
        '{"inputs": [{"shape": [1, 224,224 , 3], "data": [0, 0, 0, -1, 0.5]}]}',
        '{"shape": [ ]}',
        '{"shape":\n[\n8\n]\n}',
        r'{"data": ["\"shape\": [0]", "\u0073hape", "\\"], "name": "\""}',
        r'{"id": "a\"b", "shape": [1]}',
        '["shape"]',
    ],
)
def test_right_shapes_and_what_only_looks_like_one_are_let_in(text: str) -> None:
    assert refuse_body(text.encode(), None) is None


@settings(deadline=None, derandomize=True, max_examples=300)
@given(value=VALUES)
def test_a_key_that_json_must_escape_is_refused_and_no_other(value: Any) -> None:
    def keys(inner: Any) -> list[str]:
        if isinstance(inner, dict):
            return [*inner, *(key for item in inner.values() for key in keys(item))]
        return [key for item in inner for key in keys(item)] if isinstance(inner, list) else []

    has_escapes = any("\\" in key or '"' in key for key in keys(value))
    refusal = refuse_body(json.dumps([value]).encode(), None)
    assert (refusal is not None and "escapes" in refusal.text) == has_escapes or "digits" in str(refusal)


def test_the_parts_of_an_ensemble_are_asked_by_nobody_else() -> None:
    def asked(path: str, method: str = "POST") -> int | None:
        inner = ("clip_alarm", "clip_preprocess")
        return status(refuse_request(method, path, JSON, max_body_bytes=1000, inner_models=inner))

    assert asked("/v2/models/clip_alarm/infer") == asked("/v2/models/clip_preprocess/versions/1/infer") == 403
    assert asked("/v2/models/clip/infer") is asked("/v2/models/clip_classifier/infer") is None
    assert asked("/v2/models/clip_alarm/stats", "GET") is None
