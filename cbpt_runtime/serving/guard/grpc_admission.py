"""What may be asked over gRPC, decided before Triton reads any of it; nothing is parsed into objects here.

A message is walked in protobuf's wire format: a parser makes hundreds of megabytes of a few million empty
fields, and Triton's own is no exception. The rules are those for HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from http import HTTPStatus

from cbpt_runtime.serving.guard.admission import (
    BAD_NUMBER,
    MAX_DIGITS,
    MAX_JSON_BYTES,
    Refusal,
    refuse_inner_model,
    refuse_model_name,
)

MAX_FIELDS = 4096  # of a request, each number of a shape and each image in `contents` being one
MAX_TEXT_BYTES = 2**16  # of a request without its tensors
MAX_TYPED_BYTES = MAX_JSON_BYTES  # of tensors in `contents`: a byte becomes up to eight, as in JSON
MAX_QUESTION_BYTES = 2**12  # of all that is no inference
INFER = "/inference.GRPCInferenceService/ModelInfer"
_QUESTIONS = frozenset(
    {
        "/grpc.health.v1.Health/Check",
        *(
            f"/inference.GRPCInferenceService/{name}"
            for name in (
                "ServerLive",
                "ServerReady",
                "ServerMetadata",
                "ModelReady",
                "ModelMetadata",
                "ModelConfig",
                "ModelStatistics",
                "RepositoryIndex",
            )
        ),
    }
)
# Wire types, and what a field of a known number holds. All known numbers are below 16: a tag is one byte.
_VARINT, _FIXED64, _LENGTH = 0, 1, 2
_TEXT, _NUMBER, _SIZE, _DOUBLE, _KEY, _NAME, _VERSION, _RAW, _TYPED = (
    "text", "number", "size", "double", "key", "name", "version", "raw", "typed",
)  # fmt: skip
_Fields = dict[int, "str | _Fields"]
_PARAMETER: _Fields = {1: _KEY, 2: {1: _NUMBER, 2: _NUMBER, 3: _TEXT, 4: _DOUBLE, 5: _NUMBER}}
_CONTENTS: _Fields = dict.fromkeys(range(1, 9), _TYPED)
_INPUT: _Fields = {1: _TEXT, 2: _TEXT, 3: _SIZE, 4: _PARAMETER, 5: _CONTENTS}
_OUTPUT: _Fields = {1: _TEXT, 2: _PARAMETER}
_REQUEST: _Fields = {1: _NAME, 2: _VERSION, 3: _TEXT, 4: _PARAMETER, 5: _INPUT, 6: _OUTPUT, 7: _RAW}


def refuse_method(method: str) -> Refusal | None:
    """Refuse what nobody needs through the network; None lets it in.

    Args:
        method: As gRPC names it, ``/package.Service/Method``.
    """
    if method == INFER or method in _QUESTIONS:
        return None
    return Refusal(
        status=HTTPStatus.NOT_FOUND,
        text="expected a method for inference (not the streamed one), health, metadata, configuration, "
        f"statistics or the index; got {method[:200]}.",
    )


def refuse_message(method: str, message: bytes, *, inner_models: Collection[str] = ()) -> Refusal | None:
    """Refuse a message that Triton should not read; None lets it in.

    Args:
        method: One that was let in.
        message: The whole of it.
        inner_models: Models that only an ensemble may ask.
    """
    if method == INFER:
        try:
            _Walk(message, inner_models).fields(0, len(message), _REQUEST)
        except _RefusedError as error:
            return error.refusal
        return None
    if len(message) <= MAX_QUESTION_BYTES:
        return None
    return Refusal(
        status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        text=f"expected at most {MAX_QUESTION_BYTES:,} bytes; got {len(message):,}.",
    )


class _RefusedError(Exception):
    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(refusal.text)


_MALFORMED = Refusal(
    status=HTTPStatus.BAD_REQUEST,
    text="expected a ModelInferRequest that is not compressed; got bytes that are none.",
)
_TOO_MUCH = Refusal(
    status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    text=f"expected at most {MAX_FIELDS:,} fields, {MAX_TEXT_BYTES:,} bytes of text and {MAX_TYPED_BYTES:,} "
    "bytes in `contents`; got more. Send tensors in `raw_input_contents`.",
)
_BAD_VERSION = Refusal(
    status=HTTPStatus.BAD_REQUEST, text=f"expected a version of at most {MAX_DIGITS} digits; got another one."
)
_SHARED_MEMORY = Refusal(
    status=HTTPStatus.FORBIDDEN, text="expected tensors in the request; got shared memory."
)


@dataclass(slots=True)
class _Walk:
    """One pass over an inference request, which ends at the first thing that is not let in."""

    message: bytes
    inner_models: Collection[str]
    left: dict[str, int] = field(
        default_factory=lambda: {"fields": MAX_FIELDS, _TEXT: MAX_TEXT_BYTES, _TYPED: MAX_TYPED_BYTES}
    )

    def fields(self, at: int, end: int, known: _Fields) -> None:
        """Walk a message, or one within it; it goes no deeper than the table of what is known."""
        while at < end:
            self._count("fields", 1)
            tag = self.message[at]
            kind, wire = known.get(tag >> 3), tag & 7
            at += 1
            if wire == _LENGTH and kind not in (None, _DOUBLE):
                length, at = self._varint(at, end, most_bytes=5)
                if length > end - at:
                    raise _RefusedError(_MALFORMED)
                self._part(at, at + length, kind)
                at += length
            elif wire == _VARINT and kind in (_NUMBER, _SIZE):
                at = self._number(at, end, least=int(kind == _SIZE))
            elif wire == _FIXED64 and kind == _DOUBLE and end - at >= 8:
                at += 8
            else:
                raise _RefusedError(_MALFORMED)

    def _part(self, at: int, end: int, kind: str | _Fields | None) -> None:
        """Walk what a length stands before."""
        if isinstance(kind, dict):
            self.fields(at, end, kind)
        elif kind in (_NUMBER, _SIZE):
            while at < end:
                self._count("fields", 1)
                at = self._number(at, end, least=int(kind == _SIZE))
        elif kind == _TYPED:
            self._count(_TYPED, end - at)
        elif kind != _RAW:
            self._count(_TEXT, end - at)
            self._text(self.message[at:end], kind)

    def _text(self, content: bytes, kind: str | None) -> None:
        try:
            text = content.decode()
        except UnicodeDecodeError:
            raise _RefusedError(_MALFORMED) from None
        refusal = None
        if kind == _KEY and text.startswith("shared_memory"):
            refusal = _SHARED_MEMORY
        elif kind == _VERSION and not re.fullmatch(rf"[0-9]{{0,{MAX_DIGITS}}}", text):
            refusal = _BAD_VERSION
        elif kind == _NAME:
            refusal = refuse_model_name(text) or refuse_inner_model(text, self.inner_models)
        if refusal is not None:
            raise _RefusedError(refusal)

    def _number(self, at: int, end: int, *, least: int) -> int:
        number, at = self._varint(at, end, most_bytes=10)
        if not least <= number < 10**MAX_DIGITS:  # a negative one has all its upper bits set
            raise _RefusedError(BAD_NUMBER)
        return at

    def _varint(self, at: int, end: int, *, most_bytes: int) -> tuple[int, int]:
        """Return a number and where it ends."""
        number = 0
        for place in range(min(most_bytes, end - at)):
            byte = self.message[at + place]
            number |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                return number, at + place + 1
        raise _RefusedError(_MALFORMED)

    def _count(self, what: str, number: int) -> None:
        self.left[what] -= number
        if self.left[what] < 0:
            raise _RefusedError(_TOO_MUCH)
