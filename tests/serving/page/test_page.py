"""The page for people, its way to Triton, and both together in a real browser, against a recorded Triton."""

from __future__ import annotations

import contextlib
import copy
import http.client
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from cbpt_runtime.errors import ConfigError, WorkError
from cbpt_runtime.serving.page import UiServer
from cbpt_runtime.serving.page.server import MAX_CONNECTIONS

if TYPE_CHECKING:
    from playwright.sync_api import Page

# As Triton 2.51 answered the page's question, labels changed; its classes are "value:index:label".
QUIET: dict[str, Any] = {
    "model_name": "clip",
    "model_version": "1",
    "parameters": {"sequence_id": 0, "sequence_start": False, "sequence_end": False},
    "outputs": [
        {"name": "alarm", "datatype": "FP32", "shape": [1, 1], "data": [0.0125132198356092]},
        {"name": "alarm_target", "datatype": "INT64", "shape": [1, 1], "data": [1]},
        {
            "name": "probabilities",
            "datatype": "BYTES",
            "shape": [1, 3],
            "data": ["0.963373:2:bicycle", "0.020000:0:ratio 4:3", "0.010000:1:<b>tea</b> pot"],
        },
    ],
}
LOUD = copy.deepcopy(QUIET)
LOUD["outputs"][0]["data"] = [0.9871]
MODEL_METADATA = {"name": "clip", "versions": ["1"], "platform": "ensemble", "inputs": [], "outputs": []}
UNREADABLE = {
    "error": "in ensemble 'clip', expected a whole, readable image (JPEG, MPO, PNG, WEBP, AVIF, GIF, BMP, "
    "TIFF, PPM) in the image bytes; got cannot identify image file. Replace or remove the file."
}


@dataclass
class FakeTriton:
    """Answers with what it is told to and remembers what it was asked."""

    status: int = 200
    answer: Any = field(default_factory=lambda: QUIET)
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    wait_s: float = 0.0
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    url: str = ""

    @property
    def image(self) -> bytes:
        """The image file of the last request, read as the binary tensor extension says."""
        _, _, headers, body = self.seen[-1]
        start = int(headers["Inference-Header-Content-Length"])
        (tensor,) = json.loads(body[:start])["inputs"]
        payload = body[start:]
        assert tensor["name"] == "image"
        assert tensor["datatype"] == "BYTES"
        assert tensor["shape"] == [1, 1]
        assert tensor["parameters"]["binary_data_size"] == len(payload)
        assert struct.unpack("<I", payload[:4]) == (len(payload) - 4,)
        return payload[4:]


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    fake = FakeTriton()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.respond(MODEL_METADATA if "models" in self.path else {})

        def do_POST(self) -> None:
            self.respond(fake.answer)

        def respond(self, answer: Any) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if "ready" not in self.path:
                fake.seen.append((self.command, self.path, dict(self.headers), body))
                time.sleep(fake.wait_s)
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(fake.status)
            for name, value in {**fake.headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def ui(triton: FakeTriton) -> Iterator[UiServer]:
    with UiServer(triton.url, "clip", max_image_bytes=100_000, timeout_s=5) as server:
        yield server


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        return str(json.loads(self.body)["error"])


@pytest.fixture
def ask(ui: UiServer) -> Callable[..., Reply]:
    def send(method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        connection = http.client.HTTPConnection(ui.url.removeprefix("http://").rstrip("/"), timeout=10)
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        reply = Reply(response.status, dict(response.headers), response.read())
        connection.close()
        return reply

    return send


def jpeg(colour: tuple[int, int, int] = (200, 30, 30), size: int = 64) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(stream, "JPEG")
    return stream.getvalue()


def upload(content: bytes, name: str = "photo.jpg") -> Any:
    return {"name": name, "mimeType": "image/jpeg", "buffer": content}


# ----- the way to Triton


@pytest.mark.parametrize(("path", "kind"), [("/", "html"), ("/ui.js", "javascript"), ("/ui.css", "css")])
def test_serves_the_page_with_a_strict_policy(ask: Callable[..., Reply], path: str, kind: str) -> None:
    reply = ask("GET", path)
    assert reply.status == 200
    assert kind in reply.headers["Content-Type"]
    policy = reply.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert reply.headers["X-Content-Type-Options"] == "nosniff"


def test_page_names_its_model_and_loads_nothing_from_elsewhere(ask: Callable[..., Reply]) -> None:
    pages = b"".join(ask("GET", path).body for path in ("/", "/ui.js", "/ui.css")).decode()
    assert 'data-model="clip"' in pages
    assert "$model" not in pages
    assert "//" not in "".join(line.split("// ")[0] for line in pages.splitlines())


def test_forwards_a_question_and_its_answer(ask: Callable[..., Reply], triton: FakeTriton) -> None:
    reply = ask("POST", "/v2/models/clip/infer", b"{}xyz", Inference_Header_Content_Length="2")
    assert reply.status == 200
    assert json.loads(reply.body) == QUIET
    method, path, headers, body = triton.seen[-1]
    assert (method, path, body) == ("POST", "/v2/models/clip/infer", b"{}xyz")
    assert headers["Inference-Header-Content-Length"] == "2"


def test_forwards_nothing_a_client_adds(ask: Callable[..., Reply], triton: FakeTriton) -> None:
    ask("POST", "/v2/models/clip/infer", b"{}", Authorization="secret", Cookie="a=b", triton_grpc_x="1")
    assert {name.lower() for name in triton.seen[-1][2]} <= {
        "host",
        "connection",
        "content-length",
        "content-type",
    }


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/v2/models/clip"])
def test_forwards_health_and_metadata_of_its_model(ask: Callable[..., Reply], path: str) -> None:
    assert ask("GET", path).status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2"),
        ("GET", "/v2/models/other"),
        ("GET", "/v2/models/clip/config"),
        ("GET", "/v2/models/clip/stats"),
        ("GET", "/v2/models/clip?x=1"),
        ("GET", "/v2/models/clip/../other"),
        ("GET", "/v2/models/%63lip"),
        ("GET", "//v2/repository/index"),
        ("GET", "/metrics"),
        ("GET", "/../../etc/passwd"),
        ("GET", "/index.html/"),
        ("POST", "/"),
        ("POST", "/v2/models/other/infer"),
        ("POST", "/v2/models/clip_classifier/infer"),
        ("POST", "/v2/models/clip/versions/1/infer"),
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/clip/load"),
        ("POST", "/v2/systemsharedmemory/region/a/register"),
        ("POST", "/v2/logging"),
    ],
)
def test_everything_else_is_not_found_and_never_reaches_triton(
    ask: Callable[..., Reply], triton: FakeTriton, method: str, path: str
) -> None:
    reply = ask(method, path, b"{}" if method == "POST" else None)
    assert reply.status == 404
    assert reply.error.startswith("expected the ")
    assert triton.seen == []


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "HEAD", "TRACE"])
def test_other_methods_are_refused(ask: Callable[..., Reply], triton: FakeTriton, method: str) -> None:
    assert ask(method, "/v2/models/clip/infer").status == 501
    assert triton.seen == []


def test_reading_the_infer_path_is_refused(ask: Callable[..., Reply]) -> None:
    assert ask("GET", "/v2/models/clip/infer").status == 405


@pytest.mark.parametrize("host", ["example.org", "example.org:80", "127.0.0.1.example.org", "10.0.0.1", ""])
def test_requests_under_another_name_are_refused(
    ask: Callable[..., Reply], triton: FakeTriton, host: str
) -> None:
    assert ask("GET", "/", Host=host).status == 403
    assert ask("POST", "/v2/models/clip/infer", b"{}", Host=host).status == 403
    assert triton.seen == []


@pytest.mark.parametrize("origin", ["https://example.org", "http://127.0.0.1:1", "null"])
def test_requests_of_other_pages_are_refused(
    ask: Callable[..., Reply], triton: FakeTriton, origin: str
) -> None:
    assert ask("POST", "/v2/models/clip/infer", b"{}", Origin=origin).status == 403
    assert triton.seen == []


def test_a_forwarded_port_may_have_another_number(ask: Callable[..., Reply]) -> None:
    assert ask("GET", "/", Host="localhost:9999", Origin="http://localhost:9999").status == 200


def test_a_large_body_is_refused_before_it_is_read(ask: Callable[..., Reply], triton: FakeTriton) -> None:
    reply = ask("POST", "/v2/models/clip/infer", bytes(300_000))
    assert reply.status == 413
    assert reply.error == "expected at most 165,536 bytes; got 300,000. Send a smaller file."
    assert triton.seen == []


@pytest.mark.parametrize(
    ("length", "status"), [("", 400), ("-1", 400), ("1e3", 400), ("9" * 13, 413), ("9" * 30, 400)]
)
def test_a_body_needs_a_length(
    ask: Callable[..., Reply], triton: FakeTriton, length: str, status: int
) -> None:
    assert ask("POST", "/v2/models/clip/infer", Content_Length=length).status == status
    assert ask("POST", "/v2/models/clip/infer", Transfer_Encoding="chunked").status == 411
    assert ask("POST", "/v2/models/clip/infer", Transfer_Encoding="chunked", Content_Length="2").status == 400
    assert triton.seen == []


def test_an_error_of_triton_comes_through(ask: Callable[..., Reply], triton: FakeTriton) -> None:
    triton.status, triton.answer = 400, UNREADABLE
    reply = ask("POST", "/v2/models/clip/infer", b"{}")
    assert (reply.status, json.loads(reply.body)) == (400, UNREADABLE)


def test_an_answer_is_never_passed_on_as_a_page(ask: Callable[..., Reply], triton: FakeTriton) -> None:
    triton.headers, triton.answer = {"Content-Type": "text/html", "Set-Cookie": "a=b"}, b"<script>1</script>"
    reply = ask("POST", "/v2/models/clip/infer", b"{}")
    assert reply.headers["Content-Type"] == "application/octet-stream"
    assert "Set-Cookie" not in reply.headers


def test_an_answer_beyond_all_measure_is_refused(
    ask: Callable[..., Reply], triton: FakeTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cbpt_runtime.serving.page.server.MAX_ANSWER_BYTES", 1000)
    triton.answer = bytes(1000)
    assert ask("POST", "/v2/models/clip/infer", b"{}").body == bytes(1000)
    triton.answer = bytes(1001)
    reply = ask("POST", "/v2/models/clip/infer", b"{}")
    assert (reply.status, reply.error) == (502, "expected an answer of at most 1,000 bytes.")


def test_a_client_that_takes_no_answer_loses_its_place(
    triton: FakeTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cbpt_runtime.serving.page.server.REQUEST_TIMEOUT_S", 0.5)
    triton.answer = bytes(15_000_000)  # more than the buffers on the way hold
    with UiServer(triton.url, "clip", timeout_s=2) as server:
        host, port = server.url.removeprefix("http://").rstrip("/").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head = f"POST /v2/models/clip/infer HTTP/1.1\r\nHost: {host}\r\nContent-Length: 2"
            deaf.sendall(f"{head}\r\n\r\n{{}}".encode())
            while not triton.seen:
                time.sleep(0.01)
            time.sleep(4)
            taken = 0
            with contextlib.suppress(ConnectionError):
                while piece := deaf.recv(65_536):
                    taken += len(piece)
            assert taken < 15_000_000


def test_without_triton_the_answer_says_so(ui: UiServer) -> None:
    with UiServer("http://127.0.0.1:9", "clip") as alone:
        connection = http.client.HTTPConnection(alone.url.removeprefix("http://").rstrip("/"), timeout=10)
        connection.request("GET", "/v2/health/ready")
        response = connection.getresponse()
        assert response.status == 502
        assert "expected Triton at 127.0.0.1:9" in json.loads(response.read())["error"]
        connection.close()


def test_a_late_triton_is_given_up(triton: FakeTriton) -> None:
    triton.wait_s = 1.0
    with UiServer(triton.url, "clip", timeout_s=0.2) as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://").rstrip("/"), timeout=10)
        connection.request("POST", "/v2/models/clip/infer", b"{}")
        response = connection.getresponse()
        assert response.status == 504
        assert "within 0.2 s" in json.loads(response.read())["error"]
        connection.close()


def test_slow_clients_take_no_more_than_their_places(ui: UiServer, ask: Callable[..., Reply]) -> None:
    address = ui.url.removeprefix("http://").rstrip("/")
    idle = [http.client.HTTPConnection(address, timeout=10) for _ in range(MAX_CONNECTIONS)]
    for connection in idle:
        connection.putrequest("POST", "/v2/models/clip/infer")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b"{")
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        ask("GET", "/")
    for connection in idle:
        connection.close()
    for _ in range(100):
        try:
            assert ask("GET", "/").status == 200
            break
        except (http.client.RemoteDisconnected, ConnectionError):
            time.sleep(0.05)
    else:
        pytest.fail("the places never came back")


def test_a_request_that_trickles_in_loses_its_place(
    ui: UiServer, ask: Callable[..., Reply], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cbpt_runtime.serving.page.server.REQUEST_TIMEOUT_S", 0.5)
    host, port = ui.url.removeprefix("http://").rstrip("/").split(":")
    begin = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=0.05) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nX: ")
        while time.monotonic() < begin + 8:
            try:
                slow.sendall(b"a")
                if slow.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
    assert 0.4 < time.monotonic() - begin < 5
    assert ask("GET", "/").status == 200


def test_stops_and_frees_its_port(triton: FakeTriton) -> None:
    server = UiServer(triton.url, "clip").start()
    port = int(server.url.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(WorkError, match=f"expected a free port for the page on 127.0.0.1; got {port}"):
        UiServer(triton.url, "clip", "127.0.0.1", port).start()
    server.stop()
    server.stop()
    UiServer(triton.url, "clip", "127.0.0.1", port).start().stop()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.1", "example.org", "::", ""])
def test_listens_on_loopback_only(host: str) -> None:
    with pytest.raises(ConfigError, match="expected a loopback address"):
        UiServer("http://127.0.0.1:8000", "clip", host)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "grpc://h:1", "https://h", "http://", "http://h:x", "http://h/v2", "http://u@h"]
)
def test_needs_the_address_of_an_http_endpoint(url: str) -> None:
    with pytest.raises(ConfigError, match="expected Triton's HTTP endpoint"):
        UiServer(url, "clip")


@pytest.mark.parametrize("model", ["", "../x", "a/b", 'a"b', "<b>", "a b"])
def test_needs_the_name_of_a_model(model: str) -> None:
    with pytest.raises(ConfigError, match="expected the name of a model"):
        UiServer("http://127.0.0.1:8000", model)


# ----- the page in a browser


def test_an_image_becomes_labels_probabilities_and_no_alarm(
    ui: UiServer, triton: FakeTriton, browser_page: Page
) -> None:
    browser_page.goto(ui.url)
    assert browser_page.title() == "clip · cbpt-runtime"
    browser_page.get_by_text("ready", exact=True).wait_for()
    browser_page.set_input_files("#file", upload(jpeg()))
    browser_page.locator("#classes tr").first.wait_for()
    assert triton.image == jpeg()
    assert browser_page.locator("#classes td:first-child").all_inner_texts() == [
        "bicycle",
        "ratio 4:3",
        "<b>tea</b> pot",  # as text, not as markup
    ]
    shares = [text.strip() for text in browser_page.locator("#classes td:last-child").all_inner_texts()]
    assert shares == ["96.3 %", "2.0 %", "1.0 %"]
    assert browser_page.locator("#verdict").inner_text().startswith("No alarm")
    assert browser_page.locator("#alarm-value").inner_text() == "0.013"
    assert browser_page.locator("#preview").evaluate("image => image.complete && image.naturalWidth") == 64


def test_an_alarm_is_shown(ui: UiServer, triton: FakeTriton, browser_page: Page) -> None:
    triton.answer = LOUD
    browser_page.goto(ui.url)
    browser_page.set_input_files("#file", upload(jpeg()))
    browser_page.locator("#alarm.raised").wait_for()
    assert (
        browser_page.locator("#verdict")
        .inner_text()
        .startswith("Alarm: only the original head says “<b>tea</b> pot”.")
    )
    assert browser_page.locator("#alarm-value").inner_text() == "0.987"


def test_the_servers_reason_is_shown_and_the_old_answer_is_not(
    ui: UiServer, triton: FakeTriton, browser_page: Page
) -> None:
    browser_page.goto(ui.url)
    browser_page.set_input_files("#file", upload(jpeg()))
    browser_page.locator("#answer").wait_for()
    triton.status, triton.answer = 400, UNREADABLE
    browser_page.set_input_files("#file", upload(b"what", "not-an-image.jpg"))
    error = browser_page.locator("#error")
    error.wait_for()
    assert error.inner_text() == f"{UNREADABLE['error']} (HTTP 400)"
    assert error.get_attribute("role") == "alert"
    assert browser_page.locator("#answer").is_hidden()
    browser_page.locator("#preview").wait_for(state="hidden")  # no broken picture
    triton.status, triton.answer = 200, QUIET
    browser_page.set_input_files("#file", upload(jpeg()))
    browser_page.locator("#answer").wait_for()
    browser_page.locator("#preview").wait_for(state="visible")
    assert error.is_hidden()


def test_too_large_a_file_is_not_sent(ui: UiServer, triton: FakeTriton, browser_page: Page) -> None:
    browser_page.goto(ui.url)
    browser_page.set_input_files("#file", upload(bytes(100_001)))
    browser_page.locator("#error").wait_for()
    assert "at most 100000 bytes; got 100001" in browser_page.locator("#error").inner_text()
    assert triton.seen == []


def test_an_answer_that_is_none_is_an_error(ui: UiServer, triton: FakeTriton, browser_page: Page) -> None:
    triton.answer = {"outputs": []}
    browser_page.goto(ui.url)
    browser_page.set_input_files("#file", upload(jpeg()))
    browser_page.locator("#error").wait_for()
    assert browser_page.locator("#error").inner_text() == "The server's answer could not be read."


def test_a_server_that_went_away_is_reported(triton: FakeTriton, browser_page: Page) -> None:
    server = UiServer(triton.url, "clip").start()
    browser_page.goto(server.url)
    browser_page.get_by_text("ready", exact=True).wait_for()
    server.stop()
    browser_page.set_input_files("#file", upload(jpeg()))
    browser_page.locator("#error").wait_for()
    assert browser_page.locator("#error").inner_text() == "The server cannot be reached."


def test_the_answer_to_an_older_image_never_replaces_a_newer_one(
    ui: UiServer, triton: FakeTriton, browser_page: Page
) -> None:
    browser_page.goto(ui.url)
    triton.wait_s, triton.answer = 1.0, LOUD
    browser_page.set_input_files("#file", upload(jpeg(), "slow.jpg"))
    while not triton.seen:
        browser_page.wait_for_timeout(20)
    triton.wait_s, triton.answer = 0.0, QUIET
    browser_page.set_input_files("#file", upload(jpeg((0, 0, 9)), "fast.jpg"))
    browser_page.locator("#alarm.quiet").wait_for()
    browser_page.wait_for_timeout(1200)
    assert browser_page.locator("#alarm.quiet").count() == 1
    assert browser_page.locator("#caption").inner_text() == "fast.jpg"


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_an_image_can_be_dropped_or_pasted(
    ui: UiServer, triton: FakeTriton, browser_page: Page, event: str
) -> None:
    browser_page.goto(ui.url)
    browser_page.evaluate(
        """([kind, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "photo.jpg", {type: "image/jpeg"}));
            const options = {bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data};
            document.body.dispatchEvent(
                kind === "drop" ? new DragEvent(kind, options) : new ClipboardEvent(kind, options));
        }""",
        [event, list(jpeg())],
    )
    browser_page.locator("#answer").wait_for()
    assert triton.image == jpeg()


def test_the_page_works_from_the_keyboard(ui: UiServer, triton: FakeTriton, browser_page: Page) -> None:
    browser_page.goto(ui.url)
    browser_page.keyboard.press("Tab")
    assert browser_page.evaluate("document.activeElement.id") == "file"
    assert browser_page.locator("#drop").evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    with browser_page.expect_file_chooser() as chooser:
        browser_page.keyboard.press("Space", delay=50)  # as long as a finger takes
    chooser.value.set_files(upload(jpeg()))
    browser_page.locator("#answer").wait_for()


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_fits_the_width_of_a_phone(
    ui: UiServer, triton: FakeTriton, browser_page: Page, width: int
) -> None:
    long = "a_very_long_class_name_without_any_space_in_it_" * 3
    triton.answer = copy.deepcopy(LOUD)
    triton.answer["outputs"][2]["data"] = [f"0.5:1:{long}"]
    browser_page.set_viewport_size({"width": width, "height": 700})
    browser_page.goto(ui.url)
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (10, 1500, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    browser_page.set_input_files("#file", upload(stream.getvalue(), f"{long}.jpg"))
    browser_page.locator("#answer").wait_for()
    assert browser_page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_control_has_a_name(ui: UiServer, browser_page: Page) -> None:
    browser_page.goto(ui.url)
    assert browser_page.get_by_label("Choose an image, drop one here, or paste one").count() == 1
    browser_page.set_input_files("#file", upload(jpeg()))
    browser_page.locator("#answer").wait_for()
    assert browser_page.get_by_role("table", name="Most likely classes").count() == 1
    assert browser_page.get_by_role("img", name="The image that was classified").count() == 1
    assert browser_page.get_by_role("meter", name="Alarm").count() == 1
    assert browser_page.locator("html").get_attribute("lang") == "en"
