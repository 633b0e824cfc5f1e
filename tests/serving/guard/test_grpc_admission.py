"""What of gRPC is let through to Triton, and what is not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbpt_runtime.serving.guard.admission import Refusal
from cbpt_runtime.serving.guard.grpc_admission import (
    INFER,
    MAX_FIELDS,
    MAX_QUESTION_BYTES,
    MAX_TEXT_BYTES,
    MAX_TYPED_BYTES,
    refuse_message,
    refuse_method,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # grpc's own
    from tritonclient.grpc import service_pb2

SERVICE = "/inference.GRPCInferenceService"
INNER = ("clip_alarm", "clip_preprocess")
PIXELS = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3]}


def request(**fields: Any) -> Any:
    """A right request for pixels, with other fields."""
    right = {"model_name": "clip", "inputs": [PIXELS], "raw_input_contents": [bytes(3072)]}
    return service_pb2.ModelInferRequest(**(right | fields))


def judged(message: bytes | Any) -> int | None:
    content = message if isinstance(message, bytes) else message.SerializeToString()
    refusal = refuse_message(INFER, content, inner_models=INNER)
    return None if refusal is None else int(refusal.status)


def tensor(**fields: Any) -> list[dict[str, Any]]:
    return [PIXELS | fields]


def test_every_method_that_http_has_is_let_in_and_no_other() -> None:
    methods = {
        method.name
        for service in service_pb2.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    found = {name for name in methods if refuse_method(f"{SERVICE}/{name}") is None}
    assert found == {
        "ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig",
        "ModelStatistics", "RepositoryIndex", "ModelInfer",
    }  # fmt: skip
    assert refuse_method("/grpc.health.v1.Health/Check") is None
    for method in (
        "",
        "/",
        "ModelInfer",
        f"{SERVICE}/ModelInfer/",
        f"{SERVICE}//ModelInfer",
        "/a.b/ModelInfer",
    ):
        refusal = refuse_method(method)
        assert refusal is not None
        assert int(refusal.status) == 404


@pytest.mark.parametrize(
    "message",
    [
        request(),
        request(model_version="1", id="a b é", outputs=[{"name": "logits"}, {"name": "alarm"}]),
        request(outputs=[{"name": "logits", "parameters": {"classification": {"int64_param": 5}}}]),
        request(parameters={"priority": {"uint64_param": 1}, "x": {"double_param": 1e300}, "y": {}}),
        request(parameters={"binary_data_output": {"bool_param": True}, "z": {"string_param": "9" * 40}}),
        request(raw_input_contents=[b"\xff" * 2**20, b""] * 8),
        request(
            raw_input_contents=[],
            inputs=tensor(contents={"uint_contents": [255] * 3072, "bool_contents": [True]}),
        ),
        request(
            raw_input_contents=[],
            inputs=tensor(contents={"bytes_contents": [b"x" * 2**20] * 8, "fp32_contents": [1.0]}),
        ),
        request(inputs=tensor(shape=[999_999_999])),
        request(inputs=tensor(shape=[])),
    ],
    ids=range(10),
)
def test_what_clients_send_is_let_in(message: Any) -> None:
    assert judged(message) is None


@pytest.mark.parametrize("size", [2**63 - 1, 2**62, 2**32, 10**9, -1, -(2**63)])
def test_sizes_that_overflow_are_refused_wherever_they_stand(size: int) -> None:
    assert judged(request(inputs=tensor(shape=[size, 32, 32, 3]))) == 400
    assert judged(request(inputs=tensor(shape=[1, 32, 32, size]))) == 400
    assert judged(request(inputs=[PIXELS, PIXELS | {"shape": [size]}])) == 400
    assert judged(request(parameters={"timeout": {"int64_param": size}})) == 400
    assert (
        judged(request(outputs=[{"name": "a", "parameters": {"classification": {"int64_param": size}}}]))
        == 400
    )


def test_a_size_of_0_is_refused_and_a_number_of_0_is_not() -> None:
    assert judged(request(inputs=tensor(shape=[0, 32, 32, 3]))) == 400  # Triton takes 32 for the batch
    assert judged(request(inputs=tensor(shape=[1, 0]))) == 400
    assert judged(request(parameters={"priority": {"int64_param": 0}})) is None


def test_a_size_is_seen_in_every_way_of_writing_it() -> None:
    large = b"\xff" * 8 + b"\x7f"
    for shape in (b"\x18" + large, b"\x1a\x09" + large, b"\x18\x01\x1a\x0a\x01" + large):
        message = b"\x0a\x04clip\x2a" + bytes([len(shape)]) + shape
        assert service_pb2.ModelInferRequest.FromString(message).inputs[0].shape[-1] == 2**63 - 1
        assert judged(message) == 400
    assert judged(b"\x2a\x0d\x18" + b"\x81" + b"\x80" * 10 + b"\x00") == 400  # longer than any number


@pytest.mark.parametrize("key", ["shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"])
def test_shared_memory_is_refused_in_each_place_for_parameters(key: str) -> None:
    parameters = {key: {"string_param": "region"}}
    assert judged(request(inputs=tensor(parameters=parameters))) == 403
    assert judged(request(outputs=[{"name": "logits", "parameters": parameters}])) == 403
    assert judged(request(parameters=parameters)) == 403


def test_the_parts_of_an_ensemble_are_asked_by_nobody() -> None:
    for name in INNER:
        assert judged(request(model_name=name)) == 403
        twice = (
            request().SerializeToString() + service_pb2.ModelInferRequest(model_name=name).SerializeToString()
        )
        assert judged(twice) == 403  # the last name is the one that counts for a parser
        assert judged(service_pb2.ModelInferRequest(model_name=name).SerializeToString() + twice) == 403
    for name in ("clip_alarm\0", "../clip", "a b", "clip_alarm/versions/1", "é", "a\n"):
        assert judged(request(model_name=name)) == 400
    for version in ("-1", "1.0", "x", "9" * 10, "²"):
        assert judged(request(model_version=version)) == 400


def test_what_costs_a_parser_more_than_it_is_long_is_refused() -> None:
    assert judged(b"\x2a\x00" * MAX_FIELDS) is None
    for field in (b"\x22\x00", b"\x2a\x00", b"\x32\x00", b"\x3a\x00"):
        assert judged(field * (MAX_FIELDS + 1)) == 413
    assert judged(request(inputs=tensor(shape=[1] * MAX_FIELDS))) == 413
    assert judged(request(inputs=tensor(contents={"bytes_contents": [b""] * MAX_FIELDS}))) == 413
    assert judged(request(inputs=tensor(contents={"int64_contents": [1] * (MAX_TYPED_BYTES + 1)}))) == 413
    for text in ({"id": "x"}, {"inputs": tensor(name="x")}, {"parameters": {"x": {}}}):
        message = request(**text).SerializeToString()
        assert judged(message) is None
    assert judged(request(id="x" * MAX_TEXT_BYTES)) == 413
    assert judged(request(parameters={"a": {"string_param": "x" * MAX_TEXT_BYTES}})) == 413
    assert judged(request(inputs=tensor(name="x" * MAX_TEXT_BYTES))) == 413


@pytest.mark.parametrize(
    "message",
    [
        b"\x0b\x0c",  # groups, which nest
        b"\x7a\x00",  # field 15
        b"\x82\x01\x00",  # field 16
        b"\x8a\x00\x04clip",  # field 1, its tag longer than need be
        b"\x08\x01",  # a number for a name
        b"\x1a\x01\xff",  # text that is not UTF-8
        b"\x0d\x00\x00\x00\x00",
        b"\x0a\x05clip",
        b"\x0a",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x2a\x02\x0a\x01",  # more than its place holds
        b"\x2a\x04\x2a\x02\x78\x01",
        b"\x1f\x8b\x08\x00",  # gzip
        b"\x78\x9c\xed",  # deflate
        b"nonsense",
    ],
)
def test_what_is_no_such_message_is_refused(message: bytes) -> None:
    assert judged(message) == 400


def test_other_questions_are_short() -> None:
    for method in ("ModelConfig", "RepositoryIndex", "ServerLive"):
        assert refuse_message(f"{SERVICE}/{method}", b"\x0a\x04clip") is None
        refusal = refuse_message(f"{SERVICE}/{method}", bytes(MAX_QUESTION_BYTES + 1))
        assert refusal is not None
        assert int(refusal.status) == 413


FIELDS = st.integers(0, 255).map(lambda tag: bytes([tag]))
LENGTHS = st.binary(max_size=40).map(lambda content: bytes([len(content)]) + content)


def pieces(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Bytes that are often almost a message, and messages in messages."""
    return st.lists(st.tuples(FIELDS, inner | LENGTHS | st.binary(max_size=3)), max_size=5).map(
        lambda parts: b"".join(tag + content for tag, content in parts)
    )


MESSAGES = st.binary(max_size=200) | st.recursive(
    LENGTHS,
    lambda inner: pieces(inner).map(lambda content: bytes([len(content) & 127]) + content),
    max_leaves=8,
)


@settings(deadline=None, derandomize=True, max_examples=500)
@given(message=MESSAGES)
def test_whatever_comes_is_let_in_or_refused_with_a_sentence(message: bytes) -> None:
    refusal = refuse_message(INFER, message, inner_models=INNER)
    assert refusal is None or (isinstance(refusal, Refusal) and refusal.text.startswith("expected "))
    if refusal is None:
        check_let_in(message)


def values(message: Any) -> Iterator[tuple[str, Any]]:
    """All that stands in a message, however deep."""
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for key in value:
                yield "key", key
                yield from values(value[key])
        elif field.message_type is not None:
            for item in value if isinstance(value, list) or hasattr(value, "__len__") else [value]:
                yield from values(item)
        else:
            yield from ((field.name, item) for item in (value if hasattr(value, "append") else [value]))


def check_let_in(message: bytes) -> None:
    """What was let in is a message to a real parser, and harmless in its eyes."""
    parsed = service_pb2.ModelInferRequest.FromString(message)
    assert parsed.model_name not in INNER
    for name, value in values(parsed):
        assert name != "key" or not value.startswith("shared_memory")
        assert name != "shape" or 0 < value < 10**9


@settings(deadline=None, derandomize=True, max_examples=500)
@given(
    shape=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 40), max_size=4),
    name=st.sampled_from(("clip", "clip_alarm", "", "a")),
    key=st.sampled_from(("x", "shared_memory_region", "priority")),
    flip=st.none() | st.tuples(st.integers(0, 120), st.integers(1, 255)),
)
def test_a_message_is_judged_as_a_parser_would_read_it(
    shape: list[int], name: str, key: str, flip: tuple[int, int] | None
) -> None:
    made = request(model_name=name, inputs=tensor(shape=shape, parameters={key: {"int64_param": 1}}))
    content = bytearray(made.SerializeToString())
    if flip is not None:
        content[flip[0] % len(content)] ^= flip[1]
        if judged(bytes(content)) is None:
            check_let_in(bytes(content))
        return
    is_good = all(0 < size < 10**9 for size in shape) and name not in INNER and key != "shared_memory_region"
    assert (judged(bytes(content)) is None) == is_good
