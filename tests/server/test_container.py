"""The container file: what it starts from, what it lets in, who runs it and what it runs."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cbpt_runtime.serving.triton.servers import OLDEST_RELEASE

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "server"
LINES = [
    line
    for line in re.sub(r"\\\n", " ", (SERVER / "Dockerfile").read_text()).splitlines()
    if line and not line.startswith("#")
]


def last(instruction: str) -> str:
    return [line.split(maxsplit=1)[1] for line in LINES if line.startswith(f"{instruction} ")][-1]


def pinned() -> dict[str, str]:
    found = re.findall(r"^([a-z0-9-]+)==([^ ;]+)", (SERVER / "requirements.txt").read_text(), re.MULTILINE)
    return dict(found)


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert hadolint is not None, "the `test` extra installs it"
    command = [hadolint, "--no-color", "--failure-threshold", "style", str(SERVER / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_it_starts_from_an_official_release_with_the_fixes() -> None:
    release = re.search(r"^ARG TRITON_RELEASE=(\d\d)\.(\d\d)$", "\n".join(LINES), re.MULTILINE)
    assert release is not None
    assert (int(release[1]), int(release[2])) >= (26, 9)  # the first with every fix server/README.md names
    assert f"{release[1]}.{release[2]}" >= OLDEST_RELEASE
    assert last("FROM") == "nvcr.io/nvidia/tritonserver:${TRITON_RELEASE}-py3"


def test_it_does_not_run_as_root() -> None:
    assert last("USER") == "1000:1000"
    user = max(number for number, line in enumerate(LINES) if line.startswith("USER"))
    assert not [line for line in LINES[user:] if line.startswith(("RUN", "COPY", "ADD"))]


def test_its_command_is_one_serve_knows(parse_serve: Callable[..., dict[str, object]]) -> None:
    entry = json.loads(last("ENTRYPOINT"))
    assert entry[1:] == ["python3", "-m", "cbpt_runtime", "serve"]
    values = parse_serve(json.loads(last("CMD")))
    assert values["repository"] == Path("/models")
    ports = {str(values[name]) for name in ("http_port", "grpc_port", "metrics_port")}
    assert set(last("EXPOSE").split()) == ports
    assert f"127.0.0.1:{values['http_port']}/v2/health/ready" in last("HEALTHCHECK")


def test_nothing_secret_or_large_reaches_the_build() -> None:
    rules = [
        line
        for line in (SERVER / "Dockerfile.dockerignore").read_text().splitlines()
        if line and line[0] != "#"
    ]
    assert rules[0] == "*"
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    assert all((ROOT / path).exists() for path in allowed)
    wanted = [path for line in LINES if line.startswith("COPY") for path in line.split()[1:-1]]
    wanted += re.findall(r"type=bind,source=([^,]+),", "\n".join(LINES))
    assert wanted
    assert all(any(fnmatch.fnmatch(path, rule) for rule in allowed) for path in wanted)


def test_every_package_is_pinned_with_hashes() -> None:
    text = (SERVER / "requirements.txt").read_text()
    entries = re.split(r"\n(?=[a-z])", text.split("\n", 2)[2])
    assert entries
    assert all("--hash=sha256:" in entry for entry in entries)
    named = re.findall(r"^([a-z0-9-]+)", (SERVER / "requirements.in").read_text(), re.MULTILINE)
    assert set(named) <= set(pinned())
    assert "http" not in re.sub(r"\S*http\S*==", "", text)  # no index of anybody's


def test_it_has_all_that_serving_imports_and_nothing_of_torch() -> None:
    program = """
import sys
import cbpt_runtime.cli.serve, cbpt_runtime.serving.triton.launcher, cbpt_runtime.serving.client.asynchronous
import cbpt_runtime.runtime.triton_models, aiohttp.web, cbpt_runtime.serving.page, cbpt_runtime.cli.app
import tritonclient.grpc, tritonclient.grpc.aio, tritonclient.http, tritonclient.http.aio
from importlib.metadata import packages_distributions
homes = packages_distributions()
names = {n.lower() for m in sys.modules if "." not in m for n in homes.get(m, ())}
print(*sorted(names))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = {name.replace("_", "-").replace(".", "-") for name in done.stdout.split()}
    helpers = {"cbpt-runtime", "setuptools", "coverage"}  # of this environment: loaded by its .pth files
    assert imported - helpers <= set(pinned())
    assert not {"torch", "open-clip-torch", "onnx", "matplotlib"} & set(pinned())
