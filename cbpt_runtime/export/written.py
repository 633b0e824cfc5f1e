"""What `export` writes alike for everybody who exports the same: code, configurations, labels.

The rest of a repository are data: the graph, the golden set, one picture to warm up with, what the gate saw.
A repository with other code or configurations than the installed version writes is not served unasked, nor
one whose graph has parts that `cbpt_runtime.export.foreign_graph` names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from cbpt_runtime import runtime
from cbpt_runtime.artifacts import read_regular_file
from cbpt_runtime.bundle.papers import ATTESTATION, BOM
from cbpt_runtime.errors import ConfigError, RepositoryError
from cbpt_runtime.export import triton
from cbpt_runtime.export.foreign_graph import foreign_graph_parts
from cbpt_runtime.export.manifest import PARITY, WEIGHTS, Repository
from cbpt_runtime.export.profiles import BUILT_IN
from cbpt_runtime.export.triton import LABELS, WARMUP, Served
from cbpt_runtime.runtime.preprocess import Preprocess

GOLDEN_FOLDER = "golden"
_MAX_BYTES = 64 << 20
_MOST_NAMED = 10
_UNREADABLE = (OSError, KeyError, TypeError, ValueError, RecursionError)
_GOLDEN = re.compile(r"answers\.json|[0-9]{1,4}\.(jpg|png|image)")

_ENTRY = '''"""Written by cbpt-runtime. The code lies beside this file and is covered by the manifest."""

import sys
from pathlib import Path

sys.dont_write_bytecode = True  # the repository stays as it was hashed
sys.path.insert(0, str(Path(__file__).resolve().parent))

from runtime.triton_models import {kind} as TritonPythonModel  # noqa: E402, F401
'''
# Where a file has this name Python can neither write a cache nor be fed one that the manifest misses.
_NO_CACHE = "A file on purpose: no Python caches in this folder.\n"


def written_files(served: Served) -> dict[str, bytes]:
    """Code, configurations and labels of a repository, by their paths in it."""
    kinds = {
        served.preprocess_name: "Decoder",
        served.classifier_name: "Classifier",
        served.alarm_name: "SecondLooker" if served.profile.second_look else "AlarmCounter",
    }
    folder = Path(runtime.__file__).parent
    code = {f"{folder.name}/{file.name}": file.read_bytes() for file in sorted(folder.glob("*.py"))}
    files = {
        f"{model}/1/{name}": content
        for model, kind in kinds.items()
        for name, content in {
            **code,
            "model.py": _ENTRY.format(kind=kind).encode(),
            "__pycache__": _NO_CACHE.encode(),
        }.items()
    }
    for name, text in _configs(served):
        files[name] = f"# Written by cbpt-runtime; `cbpt-runtime verify` checks it.\n{text}".encode()
    labels = "".join(" ".join(name.split()) + "\n" for name in served.bundle.class_names).encode()
    return files | {f"{model}/{LABELS}": labels for model in (served.name, served.classifier_name)}


def _configs(served: Served) -> Iterator[tuple[str, str]]:
    yield f"{served.name}/config.pbtxt", triton.ensemble_config(served)
    yield f"{served.preprocess_name}/config.pbtxt", triton.preprocess_config(served)
    yield f"{served.alarm_name}/config.pbtxt", triton.alarm_config(served)
    yield f"{served.classifier_name}/config.pbtxt", triton.classifier_config(served)
    for target, built_in in BUILT_IN.items():
        profile = served.profile
        if profile.precision == "int8" and built_in.provider != "cpu":
            continue  # TensorRT refuses unsigned activations, and CUDA would compute in float32
        if profile.provider != built_in.provider:
            profile = replace(profile, provider=built_in.provider, instances=built_in.instances, threads=0)
        text = triton.classifier_config(replace(served, profile=profile))
        yield f"{served.classifier_name}/configs/{target}.pbtxt", text
    for_python = replace(served.profile, provider="cuda" if served.profile.provider != "cpu" else "cpu")
    text = triton.classifier_config(replace(served, profile=for_python), backend="python")
    yield f"{served.classifier_name}/configs/python.pbtxt", text


def foreign_files(repository: Repository) -> list[str]:
    """Files of a repository that the installed version would not have written so, and files too many.

    The numbers of instances and threads may be those of another machine. Behind the name of the graph it says
    in brackets what in it is foreign.

    Raises:
        RepositoryError: Nothing can be said, because the manifest or a configuration contradicts itself; or
            the graph would read files that the manifest does not list.
    """
    served = _served(repository)
    expected = written_files(served)
    graph = f"{served.classifier_name}/1/model.onnx"
    data = {
        PARITY,
        ATTESTATION,
        BOM,
        graph,
        f"{served.classifier_name}/1/{WEIGHTS}",  # the graph says whether it is its own
        f"{served.preprocess_name}/warmup/{WARMUP}",
    }
    golden = f"{served.name}/1/{GOLDEN_FOLDER}/"
    foreign = [name for name in expected if name not in repository.manifest.files]
    for name in repository.manifest.files:
        if name in expected:
            content = read_regular_file(repository.path / name, max_bytes=_MAX_BYTES)
            if content != expected[name] and not _is_same_config(name, content, expected[name]):
                foreign.append(name)
        elif name not in data and not (
            name.startswith(golden) and _GOLDEN.fullmatch(name.removeprefix(golden))
        ):
            foreign.append(name)
    parts = foreign_graph_parts(
        repository,
        image_size=served.bundle.preprocess.image_size,
        classes=len(served.bundle.class_names),
    )
    if parts:
        foreign.append(f"{graph} ({'; '.join(parts)})")
    return sorted(foreign)


def require_own_files(repository: Repository, *, allow_foreign_code: bool = False) -> list[str]:
    """Refuse `foreign_files`, or name what is let in.

    Raises:
        RepositoryError: There are some, and nobody allowed them.
    """
    foreign = foreign_files(repository)
    if foreign and not allow_foreign_code:
        more = f" and {len(foreign) - _MOST_NAMED} more" if len(foreign) > _MOST_NAMED else ""
        raise RepositoryError(
            expected=f"the code, configurations, labels and parts of a graph in {repository.path} that this "
            "version of cbpt-runtime writes, and no other files",
            got=f"something else in {', '.join(foreign[:_MOST_NAMED])}{more}",
            fix="Export the bundle again with this version; --allow-foreign-code runs what you have read "
            "and trust.",
        )
    return foreign


@dataclass(frozen=True, slots=True, kw_only=True)
class _Described:
    """Of a bundle what the manifest of a repository repeats."""

    class_names: tuple[str, ...]
    preprocess: Preprocess
    suspect_indices: tuple[int, ...]
    alarm_threshold: float | None
    logit_bias: float | None


def _served(repository: Repository) -> Served:
    manifest = repository.manifest
    file = repository.path / repository.name / "config.pbtxt"
    try:
        text = read_regular_file(file, max_bytes=_MAX_BYTES).decode()
        names = json.loads(triton.parse_config(text).parameters["class_names"].string_value)
        bundle: Any = _Described(
            class_names=tuple(str(name) for name in names),
            preprocess=manifest.preprocess,
            suspect_indices=manifest.suspects,
            alarm_threshold=manifest.alarm_threshold,
            logit_bias=0.0 if manifest.sigmoid else None,
        )
        if len(names) != manifest.classes or not all(
            0 <= index < len(names) for index in bundle.suspect_indices
        ):
            raise ValueError("other classes than the manifest says")
        return Served(
            name=repository.name,
            bundle=bundle,
            profile=manifest.profile,
            provenance=manifest.provenance,
        )
    except (
        OSError,
        KeyError,
        TypeError,
        ValueError,
        RecursionError,
        text_format.ParseError,
        ConfigError,
    ) as error:
        raise RepositoryError(
            expected=f"what a repository serves in its manifest and in {file}",
            got=f"{type(error).__name__}: {error}",
            fix="Export the bundle again with `cbpt-runtime export`.",
        ) from error


def _is_same_config(name: str, content: bytes, expected: bytes) -> bool:
    """Whether two configurations differ in nothing but the numbers of instances and threads."""
    if not name.endswith(".pbtxt"):
        return False
    try:
        return bool(_without_counts(content) == _without_counts(expected))
    except (ValueError, text_format.ParseError):
        return False


def _without_counts(content: bytes) -> Any:
    config = triton.parse_config(content.decode())
    for group in config.instance_group:
        if not 1 <= group.count <= 256:
            raise ValueError("a number of instances out of range")
        group.count = 1
    if "intra_op_thread_count" in config.parameters:
        if not 1 <= int(config.parameters["intra_op_thread_count"].string_value) <= 1024:
            raise ValueError("a number of threads out of range")
        config.parameters["intra_op_thread_count"].string_value = ""
    return config
