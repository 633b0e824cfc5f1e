"""Finding a server and asking what it can do, with stand-ins for the program."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cbpt_runtime.errors import ConfigError, ServingError
from cbpt_runtime.serving.triton import servers
from cbpt_runtime.serving.triton.servers import find_server

OLD = ("--model-repository", "--http-port", "--http-restricted-api", "--model-config-name")
NEW = (*OLD, "--http-max-input-size", "--allow-client-shm")


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITONSERVER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setattr(servers, "NGC", tmp_path / "no-image" / "bin" / "tritonserver")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that installs a stand-in which answers --help."""

    def make(
        name: str = "triton", *, flags: tuple[str, ...] = NEW, backends: tuple[str, ...] = ("python",)
    ) -> Path:
        root = tmp_path / name
        (root / "bin").mkdir(parents=True)
        program = root / "bin" / "tritonserver"
        text = "\n".join(f"  {flag} <value>\n\tMentions --not-a-flag." for flag in flags)
        program.write_text(f"#!{sys.executable}\nprint('''{text}''')\n")
        program.chmod(0o755)
        for backend in backends:
            (root / "backends" / backend).mkdir(parents=True)
            (root / "backends" / backend / f"libtriton_{backend}.so").touch()
        (root / "backends" / "empty").mkdir(parents=True)
        (root / "TRITON_VERSION").write_text("2.70.0\n")
        return program

    return make


def test_a_program_or_its_folder_is_asked_for_flags_and_backends(install: Callable[..., Path]) -> None:
    program = install(backends=("python", "onnxruntime"))
    for given in (program, program.parent.parent):
        server = find_server(given)
        assert server.executable == program
        assert server.flags == set(NEW)
        assert server.backends == {"python", "onnxruntime"}
        assert server.version == "2.70.0"
        assert not server.is_outdated


def test_an_old_server_is_known_by_the_version_beside_it(install: Callable[..., Path]) -> None:
    program = install()
    for version, is_outdated in (("2.68.0\n", True), ("2.69.0\n", False), ("é", True)):
        (program.parent.parent / "TRITON_VERSION").write_text(version)
        assert find_server(program).is_outdated is is_outdated
    (program.parent.parent / "TRITON_VERSION").unlink()
    assert find_server(program).is_outdated


def test_the_oldest_version_is_the_same_number_in_all_documents() -> None:
    root = Path(__file__).parents[3]
    named = f"{servers.OLDEST_VERSION} ({servers.OLDEST_RELEASE})"
    for file in ("SECURITY.md", "server/README.md"):
        text = " ".join((root / file).read_text(encoding="utf-8").split())
        assert re.findall(r"at least (\d\.\d\d \(\d\d\.\d\d\))", text) == [named], file


def test_places_are_searched_in_the_documented_order(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, on_path, variable, given = (install(name) for name in ("image", "path", "variable", "given"))
    monkeypatch.setattr(servers, "NGC", image)
    assert find_server().executable == image
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert find_server().executable == on_path
    monkeypatch.setenv("TRITONSERVER", str(variable))
    assert find_server().executable == variable
    assert find_server(given).executable == given


def test_no_server_says_where_it_was_looked_for_and_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"TRITONSERVER.*pip install 'cbpt-runtime\[server\]'"):
        find_server()


def test_a_named_server_that_is_not_there_is_not_replaced_by_another(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(servers, "NGC", install())
    with pytest.raises(ConfigError, match="--tritonserver says"):
        find_server(tmp_path / "missing")
    monkeypatch.setenv("TRITONSERVER", str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"\$TRITONSERVER says"):
        find_server()


def test_a_program_that_does_not_run_says_why(tmp_path: Path) -> None:
    program = tmp_path / "tritonserver"
    program.write_text("#!/bin/sh\necho 'error while loading shared libraries: libb64.so' >&2\nexit 127\n")
    program.chmod(0o755)
    with pytest.raises(ServingError, match=r"libb64\.so"):
        find_server(program)


def test_backends_in_a_place_with_an_odd_name_are_reached_by_a_plain_one(
    install: Callable[..., Path], tmp_path: Path
) -> None:
    plain, odd = find_server(install("plain")), find_server(install("o dd$(id)"))
    assert plain.link_backends(tmp_path / "a") == tmp_path / "plain" / "backends"
    linked = odd.link_backends(tmp_path / "b")
    assert linked == tmp_path / "b"
    assert (linked / "python" / "libtriton_python.so").is_file()
