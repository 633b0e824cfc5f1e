"""Find a tritonserver and ask it what it can do: its flags and its backends, before anything is started."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cbpt_runtime.errors import ConfigError, ServingError
from cbpt_runtime.serving.triton.leftovers import is_plain

VARIABLE = "TRITONSERVER"
NGC = Path("/opt/tritonserver/bin/tritonserver")
# The oldest Triton that may be opened to a network, and the release of its image. From 2.65 on its HTTP front
# end limits what a compressed body becomes, from 2.69 on it also gives back the memory of one it refused.
OLDEST_VERSION, OLDEST_RELEASE = "2.69", "26.05"
RELEASE = f"an official release (nvcr.io/nvidia/tritonserver, {OLDEST_RELEASE} or later; see SECURITY.md)"
_INSTALL = (
    "Run inside an official Triton image, name the program with --tritonserver, or install the test server "
    "with `pip install 'cbpt-runtime[server]'` (Python 3.11 or 3.12)."
)
_PROBE_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonServer:
    """A tritonserver program and what it can do.

    Attributes:
        executable: The program.
        origin: Where it was found, for people.
        flags: The flags its help names.
        backends: Names of the backends beside it.
        version: As its installation says; None where it does not.
        wheel: The `tritonserver` folder of the nvidia-pytriton wheel, when it is that one.
    """

    executable: Path
    origin: str
    flags: frozenset[str]
    backends: frozenset[str]
    version: str | None = None
    wheel: Path | None = None

    @property
    def is_outdated(self) -> bool:
        """Whether it is older than `OLDEST_VERSION`, or does not say how old it is."""
        found = re.match(r"(\d+)\.(\d+)", self.version or "")
        oldest = tuple(map(int, OLDEST_VERSION.split(".")))
        return found is None or (int(found[1]), int(found[2])) < oldest

    def environment(self) -> dict[str, str]:
        """Return the environment the program needs: this process's own, and for the wheel its libraries."""
        values = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
        if self.wheel is None:
            return values
        libraries = [str(self.wheel.parent.parent / "nvidia_pytriton.libs"), *_libpython_folder()]
        packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
        return values | {
            "LD_LIBRARY_PATH": _joined(*libraries, values.get("LD_LIBRARY_PATH")),
            "PATH": _joined(str(Path(sys.executable).parent), values.get("PATH")),
            "PYTHONPATH": _joined(*sorted(packages), values.get("PYTHONPATH")),
        }

    def link_backends(self, folder: Path) -> Path:
        """Return the folder to name as `--backend-directory`.

        The wheel keeps the python backend and one stub per Python version apart; they are linked together in
        `folder`. Other installations have their own; it is linked when the name of its place is not plain.

        Raises:
            ServingError: The wheel has no stub for the Python that runs.
        """
        if self.wheel is None:
            own = self.executable.parent.parent / "backends"
            if is_plain(own):
                return own
            folder.symlink_to(own)
            return folder
        number = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = self.wheel / "python_backend_stubs" / number / "triton_python_backend_stub"
        if not stub.is_file():
            raise ServingError(
                expected=f"a python-backend stub for Python {number} in {self.wheel}",
                got="none",
                fix="Use Python 3.11 or 3.12, or another tritonserver with --tritonserver.",
            )
        for backend in (self.wheel / "backends").iterdir():
            (folder / backend.name).mkdir(parents=True)
            for file in backend.iterdir():
                (folder / backend.name / file.name).symlink_to(file)
        (folder / "python" / stub.name).symlink_to(stub)
        return folder


def find_server(given: Path | None = None) -> TritonServer:
    """Find a tritonserver and ask it for its flags and backends.

    Looked for in this order: the one given, ``$TRITONSERVER``, ``PATH``, the official image's place, the
    nvidia-pytriton wheel.

    Raises:
        ConfigError: None was found, or the one named does not exist.
        ServingError: It does not run.
    """
    for origin, path in _candidates(given):
        if path.is_dir():
            path = path / "bin" / "tritonserver"
        if path.is_file() and os.access(path, os.X_OK):
            return _examine(path.resolve(), origin)
        if origin in ("--tritonserver", f"${VARIABLE}"):
            raise ConfigError(
                expected=f"a tritonserver program where {origin} says", got=str(path), fix=_INSTALL
            )
    raise ConfigError(
        expected=f"a tritonserver (--tritonserver, ${VARIABLE}, PATH, {NGC} or the nvidia-pytriton wheel)",
        got="none",
        fix=_INSTALL,
    )


def _candidates(given: Path | None) -> list[tuple[str, Path]]:
    found = []
    if given is not None:
        found.append(("--tritonserver", given))
    if os.environ.get(VARIABLE):
        found.append((f"${VARIABLE}", Path(os.environ[VARIABLE])))
    on_path = shutil.which("tritonserver")
    if on_path:
        found.append(("PATH", Path(on_path)))
    found.append(("the official image", NGC))
    wheel = importlib.util.find_spec("pytriton")
    if wheel is not None and wheel.origin is not None:
        found.append(("nvidia-pytriton", Path(wheel.origin).parent / "tritonserver"))
    return found


def _examine(executable: Path, origin: str) -> TritonServer:
    root = executable.parent.parent
    wheel = root if (root / "python_backend_stubs").is_dir() else None
    version = root / "TRITON_VERSION"
    server = TritonServer(
        executable=executable,
        origin="nvidia-pytriton" if wheel is not None else origin,
        flags=frozenset(),
        backends=frozenset(
            file.parent.name
            for file in root.glob("backends/*/libtriton_*.so")
            if file.name == f"libtriton_{file.parent.name}.so"
        ),
        version=version.read_text(encoding="ascii", errors="replace").strip() if version.is_file() else None,
        wheel=wheel,
    )
    return TritonServer(
        executable=server.executable,
        origin=server.origin,
        flags=_ask_flags(executable, server.environment()),
        backends=server.backends,
        version=server.version,
        wheel=wheel,
    )


def _ask_flags(executable: Path, environment: Mapping[str, str]) -> frozenset[str]:
    try:
        done = subprocess.run(  # noqa: S603
            [executable, "--help"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _does_not_run(executable, str(error)) from error
    flags = frozenset(re.findall(r"^\s*(--[a-z0-9-]+)", done.stdout + done.stderr, flags=re.MULTILINE))
    if "--model-repository" not in flags:
        lines = (done.stderr + done.stdout).strip().splitlines()
        raise _does_not_run(executable, lines[-1] if lines else f"exit code {done.returncode}")
    return flags


def _does_not_run(executable: Path, got: str) -> ServingError:
    return ServingError(
        expected=f"{executable} to answer --help with its flags",
        got=got,
        fix="Check that its libraries are installed (`ldd` names those that are missing), or choose another.",
    )


def _libpython_folder() -> list[str]:
    """Where the stub of the wheel finds libpython, if the system does not know it anyway.

    Raises:
        ServingError: There is none: this Python was built without a shared library.
    """
    number = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = sysconfig.get_config_var("LIBDIR")
    if folder and (Path(folder) / f"libpython{number}.so.1.0").exists():
        return [folder]
    if ctypes.util.find_library(f"python{number}"):
        return []
    raise ServingError(
        expected=f"libpython{number}.so.1.0, which Triton's python backend needs",
        got=f"none in {folder} or among the system's libraries",
        fix=f"Install it (Debian and Ubuntu: libpython{number}), or use a Python built with --enable-shared.",
    )


def _joined(*parts: str | None) -> str:
    return os.pathsep.join(part for part in parts if part)
