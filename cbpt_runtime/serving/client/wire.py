"""Triton's two protocols behind one small interface, what their errors mean, and what is sent again."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import random
import socket
import time
import warnings
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

import numpy as np

from cbpt_runtime.errors import ConfigError, RequestError, ServingError
from cbpt_runtime.serving.guard.admission import is_loopback_name

Kind = Literal["refused", "busy", "unreachable", "timeout", "broken"]
_LARGEST = 2**31 - 1  # bytes: as tritonclient's own options, which giving others replaces
_GRPC_OPTIONS = [("grpc.max_send_message_length", _LARGEST), ("grpc.max_receive_message_length", _LARGEST)]
_NO_PROXY = ("grpc.enable_http_proxy", 0)
_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")  # in gRPC's order
_SCHEMES = ("grpc", "grpcs", "http", "https")
_HTTP_KINDS: dict[int, Kind] = {429: "busy", 502: "busy", 503: "busy", 504: "timeout"}  # some are a gateway's
_GRPC_KINDS: dict[str, Kind] = {
    "INVALID_ARGUMENT": "refused",
    "NOT_FOUND": "refused",
    "ALREADY_EXISTS": "refused",
    "OUT_OF_RANGE": "refused",
    "UNIMPLEMENTED": "refused",
    "FAILED_PRECONDITION": "refused",
    "RESOURCE_EXHAUSTED": "refused",  # a message larger than the limit
    "UNAUTHENTICATED": "refused",
    "PERMISSION_DENIED": "refused",
    "UNAVAILABLE": "busy",
    "DEADLINE_EXCEEDED": "timeout",
}
_RETRIED = ("busy", "unreachable")  # nothing was answered; asking again is safe and may help
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
T = TypeVar("T")


class WireError(Exception):
    """What went wrong with one request.

    Attributes:
        kind: 'refused' (the request is at fault), 'busy' (nothing was done: the queue is full, or nobody
            listens), 'unreachable' (the connection failed), 'timeout', or 'broken' (the server is at fault).
    """

    def __init__(self, kind: Kind, message: str) -> None:
        self.kind: Kind = kind
        super().__init__(message)


class Wire(Protocol):
    """One protocol, spoken with one server. Every method may raise WireError."""

    async def infer(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], timeout_s: float
    ) -> dict[str, np.ndarray]:
        """Send one request."""

    async def config(self, model: str, timeout_s: float) -> dict[str, Any]:
        """Return a model's configuration."""

    async def models(self, timeout_s: float) -> list[str]:
        """Names of the models that are ready."""

    async def statistics(self, model: str, timeout_s: float) -> dict[str, Any]:
        """Return a model's counters since the server's start."""

    async def server(self, timeout_s: float) -> dict[str, Any]:
        """Return the server's name and version."""

    async def close(self) -> None:
        """Close the connections."""


def open_wire(url: str, *, headers: Mapping[str, str] | None = None) -> Wire:
    """Return the wire a URL names. Nothing is sent yet; call it where an event loop runs.

    Args:
        url: ``grpc://host:port``, ``http://host:port``, or with TLS ``grpcs://`` and ``https://``.
        headers: Sent with every request, for a gateway that wants to know who asks.

    Raises:
        ConfigError: Not such a URL.
    """
    parts = urlsplit(url)
    try:
        is_good = parts.scheme in _SCHEMES and parts.hostname and parts.port and parts.path in ("", "/")
    except ValueError:
        is_good = False
    if not is_good or parts.query or parts.username:
        raise ConfigError(
            expected="a server's URL: grpc://HOST:PORT or http://HOST:PORT (grpcs://, https:// with TLS)",
            got=repr(url),
            fix="`cbpt-runtime serve` prints the URLs of its server.",
        )
    is_secure = parts.scheme.endswith("s")
    kind = _GrpcWire if parts.scheme.startswith("grpc") else _HttpWire
    return kind(parts.netloc, is_secure=is_secure, headers=dict(headers or {}))


class _GrpcWire:
    def __init__(self, address: str, *, is_secure: bool, headers: dict[str, str]) -> None:
        self._library = _load(lambda: __import__("tritonclient.grpc.aio", fromlist=["aio"]))
        self._headers = headers
        host = urlsplit(f"//{address}").hostname or ""
        is_here = _is_this_machine(host)
        self._through = None if is_here else _proxy_variable(host)
        options = [*_GRPC_OPTIONS, *([_NO_PROXY] if is_here else [])]
        self._client = self._library.InferenceServerClient(address, ssl=is_secure, channel_args=options)

    async def infer(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], timeout_s: float
    ) -> dict[str, np.ndarray]:
        tensors = [_input(self._library, name, value) for name, value in inputs.items()]
        wanted = [self._library.InferRequestedOutput(name) for name in outputs]
        call = self._client.infer(
            model, tensors, outputs=wanted, client_timeout=timeout_s, headers=dict(self._headers)
        )
        result = await self._ask(call, timeout_s)
        return {name: result.as_numpy(name) for name in outputs}

    async def config(self, model: str, timeout_s: float) -> dict[str, Any]:
        call = self._client.get_model_config(model, as_json=True, headers=dict(self._headers))
        return dict((await self._ask(call, timeout_s))["config"])

    async def models(self, timeout_s: float) -> list[str]:
        call = self._client.get_model_repository_index(as_json=True, headers=dict(self._headers))
        return _ready((await self._ask(call, timeout_s)).get("models", []))

    async def statistics(self, model: str, timeout_s: float) -> dict[str, Any]:
        call = self._client.get_inference_statistics(model, as_json=True, headers=dict(self._headers))
        return dict((await self._ask(call, timeout_s))["model_stats"][0])

    async def server(self, timeout_s: float) -> dict[str, Any]:
        call = self._client.get_server_metadata(as_json=True, headers=dict(self._headers))
        return dict(await self._ask(call, timeout_s))

    async def close(self) -> None:
        await self._client.close()

    async def _ask(self, call: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
        import grpc
        from tritonclient.utils import InferenceServerException

        try:
            return await _within(call, timeout_s + 1)
        except TimeoutError:
            raise self._error("timeout", f"no answer within {timeout_s:g} s") from None
        except InferenceServerException as error:
            code = str(error.status()).removeprefix("StatusCode.")
            kind = _kind(_GRPC_KINDS.get(code, "broken"), str(error.message()))
            text = str(error.message())
            if code == "UNKNOWN" and "Stream removed" in text:
                kind = "unreachable"
            raise self._error(kind, f"{code}: {text}") from error
        except grpc.RpcError as error:
            raise self._error("unreachable", str(error)) from error

    def _error(self, kind: Kind, text: str) -> WireError:
        """Return the error, with the proxy that is in the way where one may be."""
        is_proxys = self._through is not None and kind in ("busy", "unreachable", "timeout")
        way = f" (asked through the proxy of {self._through}; no_proxy leaves it out)" if is_proxys else ""
        return WireError(kind, text + way)


class _HttpWire:
    def __init__(self, address: str, *, is_secure: bool, headers: dict[str, str]) -> None:
        self._library = _load(lambda: __import__("tritonclient.http.aio", fromlist=["aio"]))
        self._headers = headers
        # Its own time-out ends a whole session's requests; each request has its own here.
        self._client = self._library.InferenceServerClient(address, ssl=is_secure, conn_timeout=None)
        self._client._stub.trace_configs.append(_no_redirects())

    async def infer(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], timeout_s: float
    ) -> dict[str, np.ndarray]:
        tensors = [_input(self._library, name, value) for name, value in inputs.items()]
        wanted = [self._library.InferRequestedOutput(name, binary_data=True) for name in outputs]
        call = self._client.infer(model, tensors, outputs=wanted, headers=dict(self._headers))
        result = await self._ask(call, timeout_s)
        return {name: result.as_numpy(name) for name in outputs}

    async def config(self, model: str, timeout_s: float) -> dict[str, Any]:
        call = self._client.get_model_config(model, headers=dict(self._headers))
        return dict(await self._ask(call, timeout_s))

    async def models(self, timeout_s: float) -> list[str]:
        call = self._client.get_model_repository_index(headers=dict(self._headers))
        return _ready(await self._ask(call, timeout_s))

    async def statistics(self, model: str, timeout_s: float) -> dict[str, Any]:
        call = self._client.get_inference_statistics(model, headers=dict(self._headers))
        return dict((await self._ask(call, timeout_s))["model_stats"][0])

    async def server(self, timeout_s: float) -> dict[str, Any]:
        call = self._client.get_server_metadata(headers=dict(self._headers))
        return dict(await self._ask(call, timeout_s))

    async def close(self) -> None:
        await self._client.close()

    async def _ask(self, call: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
        import aiohttp
        from tritonclient.utils import InferenceServerException

        try:
            return await _within(call, timeout_s)
        except TimeoutError:
            raise WireError("timeout", f"no answer within {timeout_s:g} s") from None
        except InferenceServerException as error:
            status = str(error.status() or "")
            code = int(status) if status.isdigit() else 0
            kind = _HTTP_KINDS.get(code, "refused" if 400 <= code < 500 else "broken")
            raise WireError(
                _kind(kind, str(error.message())), f"HTTP {status or 'error'}: {error.message()}"
            ) from error
        except aiohttp.ClientResponseError as error:
            raise WireError("unreachable", "what answers there does not speak HTTP") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise WireError("unreachable", str(error) or type(error).__name__) from error


def _is_this_machine(host: str) -> bool:
    """Whether an address is the loopback's or another one of this machine, to which no proxy leads."""
    if is_loopback_name(host):
        return True
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((str(ipaddress.IPv4Address(host)), 0))
    except (OSError, ValueError):
        return False
    return True


def _proxy_variable(host: str) -> str | None:
    """Name the environment variable whose proxy gRPC uses for a host; its value may hold a password."""
    if proxy_bypass(host):
        return None
    return next((name for name in _PROXY_VARIABLES if os.environ.get(name)), None)


def _no_redirects() -> Any:
    """End a request that is answered with another address: headers and images are for this server alone."""
    import aiohttp

    async def refuse(
        _session: object, _context: object, redirected: aiohttp.TraceRequestRedirectParams
    ) -> None:
        place = redirected.response.headers.get("Location", "")
        raise WireError("refused", f"a redirect to {place[:200]!r}, which is not followed")

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(refuse)
    trace.freeze()
    return trace


def _kind(kind: Kind, message: str) -> Kind:
    """Return the kind of an error, once three that say little are seen for what they are.

    Triton 2.51 may blame the last step of an ensemble for what a full queue did to the step before. Where a
    process of its python backend died, nothing was answered, nor will be before the server is started again.
    And a gateway's 413 reaches a gRPC client as an unknown error.
    """
    if kind == "broken" and "http2 header with status: 4" in message:
        return "refused"
    is_starved = kind == "refused" and "but got 0 inputs for model" in message
    is_dead = kind == "broken" and "Stub process" in message and "is not healthy" in message
    return "busy" if is_starved or is_dead else kind


async def _within(call: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
    """As `asyncio.wait_for`, which would wait on for a call that does not heed its cancellation."""
    task = asyncio.ensure_future(call)
    try:
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not done:
        task.cancel()
        raise TimeoutError
    return task.result()


def _input(library: Any, name: str, value: np.ndarray) -> Any:
    kind = "BYTES" if value.dtype == np.object_ else "UINT8"
    tensor = library.InferInput(name, list(value.shape), kind)
    tensor.set_data_from_numpy(value)
    return tensor


def _ready(models: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted(model["name"] for model in models if model.get("state") == "READY")


def _load(load: Callable[[], Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # grpc's and gevent's own
            return load()
    except ImportError as error:
        raise ConfigError(
            expected="tritonclient with gRPC and HTTP",
            got=str(error),
            fix="Install it: pip install 'tritonclient[grpc,http]'.",
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How long and how often one server is asked.

    Attributes:
        url: Of the server, for people.
        timeout_s: For one request with all its retries.
        number: How often a request is sent again when nothing was answered; nothing else is ever sent twice.

    Raises:
        ConfigError: A number is out of range.
    """

    url: str
    timeout_s: float
    number: int

    def __post_init__(self) -> None:
        if not (self.timeout_s > 0 and self.number >= 0):
            raise ConfigError(
                expected="a time-out above 0 and at least 0 retries",
                got=f"{self.timeout_s}, {self.number}",
                fix="Correct the argument.",
            )

    async def ask(self, send: Callable[[float], Coroutine[Any, Any, T]]) -> T:
        """Send a request, and again where that is safe, until the time is up."""
        deadline = time.monotonic() + self.timeout_s
        pause_s = _FIRST_PAUSE_S
        for attempt in range(self.number + 1):
            try:
                return await send(max(0.001, deadline - time.monotonic()))
            except WireError as error:
                wait_s = pause_s * random.uniform(0.5, 1.5)  # not all clients at the same moment
                is_last = attempt == self.number or time.monotonic() + wait_s >= deadline
                if error.kind not in _RETRIED or is_last:
                    raise self._explained(error, attempt + 1) from error
            await asyncio.sleep(wait_s)
            pause_s = min(4 * pause_s, _LONGEST_PAUSE_S)
        raise RuntimeError("unreachable: the last attempt returns or raises")

    def _explained(self, error: WireError, attempts: int) -> RequestError | ServingError:
        if error.kind == "refused":
            return RequestError(
                expected=f"a request {self.url} accepts", got=str(error), fix="Correct what was sent."
            )
        fixes = {
            "busy": "The server has no room or is not there; try later or with fewer requests at once.",
            "unreachable": "Check that `cbpt-runtime serve` runs and that the URL is right.",
            "timeout": "Allow more time, or ask with fewer requests at once.",
            "broken": "Look at the server's log.",
        }
        times = f" (asked {attempts} times)" if attempts > 1 else ""
        return ServingError(
            expected=f"an answer from {self.url}", got=f"{error}{times}", fix=fixes[error.kind]
        )
