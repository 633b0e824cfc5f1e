"""Who may ask over HTTP and what a question may look like, decided before Triton reads any of it.

`grpc_admission` has what is gRPC's own; what holds for both is here, with how much is held at once.

Web browsers send requests for any page to any port of this machine. Such a request is known by its `Origin`,
its `Sec-Fetch-Site`, or by a `Host` that is somebody else's name for this machine (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urlsplit

import numpy as np

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_JSON_BYTES = 2**24
MAX_JSON_DEPTH = 32
# Of a whole number. Shapes whose sizes overflow end Triton or spoil the batch they are in; so does a batch of
# none, for which Triton takes the size after it.
MAX_DIGITS = 9
_BODY_TYPES = ("application/json", "application/octet-stream")  # neither can be sent by a form
# Names nobody outside a network can own: one word, or what clusters and private networks use.
_INTERNAL = re.compile(r"[a-z0-9_-]+|[a-z0-9_.-]+\.(svc|cluster\.local|internal)")
_NAME = r"[A-Za-z0-9_.-]+"
_HOST = re.compile(r"\[[^\[\]]*\](:[0-9]*)?|[^\[\]]*")  # nothing but a port behind an address in brackets
_MODEL = rf"/v2/models/{_NAME}(/versions/[0-9]+)?"
_READABLE = re.compile(rf"/v2|/v2/health/(live|ready)|/v2/models/stats|{_MODEL}(/ready|/config|/stats)?")
_ASKABLE = re.compile(rf"{_MODEL}/infer|/v2/repository/index")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_SIZES = rb"(?:[1-9][0-9]*\s*(?:,\s*[1-9][0-9]*\s*)*)?"  # a possessive group matches wrongly in Python 3.11.2
_BAD_SHAPE = re.compile(rb'"shape"\s*+:\s*+(?!\[\s*+%s\])' % _SIZES)
# All of a text, as long as no key in it holds a backslash, and so none can be `shape` under cover.
_PLAIN_KEYS = re.compile(rb'(?:[^"]++|"[^"\\]*+"|"(?:[^"\\]++|\\.)*+(?:"(?!\s*+:)|\Z))*+', re.DOTALL)
_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))
_BRACKETS = b"[{]}"
_STEPS = bytes.maketrans(_BRACKETS, bytes((1, 1, 255, 255)))
_OTHERS = bytes(set(range(256)) - set(_BRACKETS))
REQUEST_TIMEOUT_S = 120.0  # for all of a body or message
ANSWER_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request is not let through.

    Attributes:
        status: Of the answer.
        text: For the one who asked.
    """

    status: HTTPStatus
    text: str

    @property
    def content(self) -> bytes:
        """The answer's body over HTTP, in Triton's own form."""
        return json.dumps({"error": self.text}).encode()


BAD_NUMBER = Refusal(
    status=HTTPStatus.BAD_REQUEST,
    text=f"expected whole numbers of at most {MAX_DIGITS} digits, and above 0 in a shape; got another one. "
    "Send the shape of the data.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The names a server may be called by.

    Attributes:
        is_open: Whether it listens beyond the loopback: then any address and any internal name will do, too.
        others: Further names, lower case.
    """

    is_open: bool = False
    others: frozenset[str] = frozenset()

    def include(self, name: str) -> bool:
        """Whether a host name is one of them."""
        name = name.lower().rstrip(".")
        if name in self.others or is_loopback_name(name):
            return True
        return self.is_open and (_is_address(name) or _INTERNAL.fullmatch(name) is not None)


def refuse_caller(headers: Mapping[str, str], names: Names) -> Refusal | None:
    """Refuse what another web page sends, or what arrives under somebody else's name; None lets it in."""
    host = headers.get("Host", "")
    try:
        name = (urlsplit(f"//{host}").hostname or "") if _HOST.fullmatch(host) else ""
    except ValueError:
        name = ""
    if not names.include(name):
        return Refusal(
            status=HTTPStatus.FORBIDDEN,
            text="expected a request from this server's own page or a program, by a loopback name or one "
            f"given with --allow-host; got the name {host[:200]!r}.",
        )
    origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site", "none")
    if (origin is None or origin == f"http://{host}") and site in ("none", "same-origin"):
        return None
    return Refusal(
        status=HTTPStatus.FORBIDDEN,
        text="expected a request from this server's own page or a program; got one of another web page.",
    )


def refuse_request(
    method: str,
    path: str,
    headers: Mapping[str, str],
    *,
    max_body_bytes: int,
    inner_models: Collection[str] = (),
) -> Refusal | None:
    """Refuse a request for Triton by all that is known before its body; None lets it in.

    Args:
        method: Of HTTP.
        path: As it was sent.
        headers: Of the request.
        max_body_bytes: The largest body.
        inner_models: Models that only an ensemble may ask: who counts alarms must not be told of any.
    """
    pattern = {"GET": _READABLE, "POST": _ASKABLE}.get(method)
    if pattern is None:
        return Refusal(status=HTTPStatus.METHOD_NOT_ALLOWED, text=f"expected GET or POST; got {method[:20]}.")
    if not pattern.fullmatch(path):
        return Refusal(
            status=HTTPStatus.NOT_FOUND,
            text=f"expected an inference, health or metadata path for {method}; got {path[:200]}.",
        )
    if method == "POST" and (refusal := refuse_inner_model(path.split("/")[3], inner_models)):
        return refusal
    if "Content-Encoding" in headers:
        return Refusal(
            status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            text="expected a body that is not compressed; got a Content-Encoding.",
        )
    return refuse_length(headers, max_body_bytes) if method == "POST" else None


def refuse_inner_model(name: str, inner_models: Collection[str]) -> Refusal | None:
    """Refuse to ask a model that only an ensemble may ask."""
    if name not in inner_models:
        return None
    return Refusal(
        status=HTTPStatus.FORBIDDEN,
        text="expected the model that takes image files, or the one that takes pixels; got a part of it.",
    )


def refuse_model_name(name: str) -> Refusal | None:
    """Refuse a name that no model of a repository can have."""
    if re.fullmatch(_NAME, name):
        return None
    return Refusal(
        status=HTTPStatus.BAD_REQUEST,
        text=f"expected the name of a model: letters, digits and ._-; got {name[:200]!r}.",
    )


def refuse_length(headers: Mapping[str, str], max_body_bytes: int) -> Refusal | None:
    """Refuse a body without a length, or a large one."""
    length = headers.get("Content-Length", "")
    if "Transfer-Encoding" in headers or not re.fullmatch(r"[0-9]{1,12}", length):
        return Refusal(status=HTTPStatus.LENGTH_REQUIRED, text="expected a Content-Length; got none.")
    if int(length) > max_body_bytes:
        return Refusal(
            status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            text=f"expected at most {max_body_bytes:,} bytes; got {int(length):,}. Send a smaller file.",
        )
    kind = headers.get("Content-Type", _BODY_TYPES[0]).partition(";")[0].strip().lower()
    if int(length) and kind not in _BODY_TYPES:
        return Refusal(
            status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            text=f"expected a body of type {' or '.join(_BODY_TYPES)}; got {kind[:100]}.",
        )
    return None


def refuse_body(body: bytes | bytearray, header_length: str | None) -> Refusal | None:
    """Refuse a body whose JSON Triton should not read: too long, nested too deeply, or with huge numbers.

    Args:
        body: The whole of it.
        header_length: How many bytes of it are JSON, as the request's header says; all when None.
    """
    if header_length is None:
        length = len(body)
    elif re.fullmatch(r"[0-9]{1,12}", header_length) and int(header_length) <= len(body):
        length = int(header_length)
    else:
        return Refusal(
            status=HTTPStatus.BAD_REQUEST,
            text=f"expected a length of at most {len(body):,} bytes in {HEADER_LENGTH}; "
            f"got {header_length[:20]!r}.",
        )
    if length > MAX_JSON_BYTES:
        return Refusal(
            status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            text=f"expected at most {MAX_JSON_BYTES:,} bytes of JSON; got {length:,}. Send binary tensors.",
        )
    text = bytes(body[:length])
    if _BAD_SHAPE.search(text):
        return BAD_NUMBER
    if _LONG_NUMBER.search(text) and _LONG_NUMBER.search(_STRING.sub(b"", text)):
        return BAD_NUMBER
    if b"\\" in text and _PLAIN_KEYS.fullmatch(text) is None:
        return Refusal(
            status=HTTPStatus.BAD_REQUEST, text="expected JSON without escapes in keys; got a key with some."
        )
    if not is_shallow(text):
        return Refusal(
            status=HTTPStatus.BAD_REQUEST,
            text=f"expected JSON nested at most {MAX_JSON_DEPTH} levels deep; got more. Send flat tensors.",
        )
    return None


def is_shallow(text: bytes, most: int = MAX_JSON_DEPTH) -> bool:
    """Whether a text that may be JSON is nested no deeper; brackets in strings do not count."""
    if text.count(b"[") + text.count(b"{") <= most:
        return True
    steps = np.frombuffer(_STRING.sub(b"", text).translate(_STEPS, _OTHERS), np.int8)
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0)) <= most


def is_loopback_name(host: str) -> bool:
    """Whether a host name means this machine and nothing else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_address(name: str) -> bool:
    """Whether it is an address: no page can come from a name that leads here by a change of DNS."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


FULL = Refusal(status=HTTPStatus.SERVICE_UNAVAILABLE, text="too many large requests. Try again.")
NOT_THERE = Refusal(
    status=HTTPStatus.SERVICE_UNAVAILABLE, text="Triton is not there: it starts, stops or broke. Try again."
)


class Room:
    """Counts the bytes of requests that have no answer yet.

    Args:
        most_bytes: What fits.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0

    def take(self, number: int) -> bool:
        """Hold so many bytes more; False, and nothing more is held, when they do not fit."""
        if self.held_bytes + number > self.most_bytes:
            return False
        self.held_bytes += number
        return True

    def give_back(self, number: int) -> None:
        """Hold so many bytes less."""
        self.held_bytes -= number
