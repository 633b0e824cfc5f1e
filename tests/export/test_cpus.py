"""What is said about the processor."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from cbpt_runtime.export import cpus


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        ("flags\t\t: fpu avx2 fma\n", ["avx2"]),
        ("flags\t\t: avx512_vnni avx2 avx512f\n\nflags : amx_int8\n", ["avx2", "avx512f", "avx512_vnni"]),
        ("Features\t: fp asimd asimddp\n", ["asimd", "asimddp"]),
        ("", []),
    ],
)
def test_the_kind_of_a_processor_is_its_architecture_and_what_kernels_are_chosen_by(
    cpuinfo: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(cpuinfo)
    monkeypatch.setattr(cpus, "CPUINFO", file)
    assert cpus.instructions() == found
    assert cpus.kind_of_processor() == " ".join([platform.machine(), *found])


def test_where_linux_does_not_say_the_architecture_is_all_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpus, "CPUINFO", tmp_path / "missing")
    assert cpus.kind_of_processor() == platform.machine()
