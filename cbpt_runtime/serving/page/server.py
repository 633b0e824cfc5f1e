"""The page's server: checked addresses, started and stopped."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Self
from urllib.parse import urlsplit

from cbpt_runtime.errors import ConfigError, WorkError
from cbpt_runtime.runtime.triton_models import ALARM_THRESHOLD
from cbpt_runtime.serving.guard.admission import is_loopback_name
from cbpt_runtime.serving.page.handler import Server, Settings

MAX_IMAGE_BYTES = 20_000_000
MAX_ENVELOPE_BYTES = 65_536  # the JSON around the image
_TEXT = {"html": "text/html", "js": "text/javascript", "css": "text/css"}


class UiServer:
    """The page and its way to Triton.

    Args:
        triton_url: Triton's HTTP endpoint, such as ``http://127.0.0.1:8000``.
        model: Name of the model that takes image files; no other can be reached.
        host: A loopback address.
        port: 0 takes a free one.
        max_image_bytes: Larger images are refused before they are read.
        timeout_s: How long Triton may take for an answer.
        alarm_threshold: Above which alarm the page warns; the counters' own where the repository names none.

    Raises:
        ConfigError: An address or a name that cannot be used.
    """

    def __init__(
        self,
        triton_url: str,
        model: str,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        max_image_bytes: int = MAX_IMAGE_BYTES,
        timeout_s: float = 60.0,
        alarm_threshold: float | None = None,
    ) -> None:
        address = _parse_endpoint(triton_url)
        _check_loopback(host)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", model):
            raise ConfigError(
                expected="the name of a model",
                got=repr(model),
                fix="Give the name the repository was made with.",
            )
        self._settings = Settings(
            triton=address,
            pages=_render(
                {
                    "model": model,
                    "max_image_bytes": str(max_image_bytes),
                    "alarm_threshold": str(ALARM_THRESHOLD if alarm_threshold is None else alarm_threshold),
                }
            ),
            readable=frozenset({"/v2/health/live", "/v2/health/ready", f"/v2/models/{model}"}),
            infer=f"/v2/models/{model}/infer",
            max_body_bytes=max_image_bytes + MAX_ENVELOPE_BYTES,
            timeout_s=timeout_s,
        )
        self._host, self._port = host, port
        self._server: Server | None = None

    @property
    def url(self) -> str:
        """Where the page is, once started."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        port = self._port if self._server is None else self._server.server_address[1]
        return f"http://{host}:{port}/"

    def start(self) -> Self:
        """Serve in a thread of its own.

        Raises:
            WorkError: The port is taken or cannot be used.
        """
        try:
            self._server = Server(self._host, self._port, self._settings)
        except (OSError, OverflowError) as error:
            raise WorkError(
                expected=f"a free port for the page on {self._host}",
                got=f"{self._port} ({error})",
                fix="Choose another --ui-port.",
            ) from error
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="ui", daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop listening; answers under way are dropped."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _render(values: Mapping[str, str]) -> dict[str, tuple[str, bytes]]:
    folder = files("cbpt_runtime.serving.page")
    pages = {}
    for name in ("index.html", "ui.js", "ui.css"):
        text = (folder / name).read_text(encoding="utf-8")
        if name == "index.html":
            text = Template(text).substitute(values)
        kind = f"{_TEXT[name.rsplit('.', 1)[1]]}; charset=utf-8"
        pages["/" if name == "index.html" else f"/{name}"] = (kind, text.encode())
    return pages


def _parse_endpoint(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme != "http" or not host or parts.path not in ("", "/") or parts.query or parts.username:
        raise ConfigError(
            expected="Triton's HTTP endpoint, such as http://127.0.0.1:8000",
            got=repr(url),
            fix="Correct the URL.",
        )
    return host, 80 if port is None else port


def _check_loopback(host: str) -> None:
    if not is_loopback_name(host):
        raise ConfigError(
            expected="a loopback address for the page, which authenticates nobody",
            got=repr(host),
            fix="Leave it at 127.0.0.1; for others put a gateway with TLS and authentication in front.",
        )
