"""What `export` writes alike for everybody who exports the same: code, configurations, labels.

The rest of a repository are data: the graph, the golden set, one picture to warm up with, what the gate saw.
A repository with other code or configurations than the installed version writes is not served unasked, nor
one whose graph has parts that `cbpt_runtime.export.foreign_graph` names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from cbpt_runtime import runtime
from cbpt_runtime.artifacts import read_regular_file
from cbpt_runtime.bundle.papers import ATTESTATION, BOM
from cbpt_runtime.errors import ConfigError, RepositoryError
from cbpt_runtime.export import triton
from cbpt_runtime.export.foreign_graph import foreign_graph_parts
from cbpt_runtime.export.manifest import PARITY, WEIGHTS, Manifest, Repository
from cbpt_runtime.export.profiles import BUILT_IN
from cbpt_runtime.export.triton import LABELS, WARMUP

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


def written_files(manifest: Manifest, class_names: Sequence[str]) -> dict[str, bytes]:
    """Code, configurations and labels of a repository, by their paths in it."""
    kinds = {
        manifest.preprocess_name: "Decoder",
        manifest.classifier_name: "Classifier",
        manifest.alarm_name: "SecondLooker" if manifest.profile.second_look else "AlarmCounter",
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
    for name, text in _configs(manifest, class_names):
        files[name] = f"# Written by cbpt-runtime; `cbpt-runtime verify` checks it.\n{text}".encode()
    labels = "".join(" ".join(name.split()) + "\n" for name in class_names).encode()
    return files | {f"{model}/{LABELS}": labels for model in (manifest.name, manifest.classifier_name)}


def _configs(manifest: Manifest, class_names: Sequence[str]) -> Iterator[tuple[str, str]]:
    yield f"{manifest.name}/config.pbtxt", triton.ensemble_config(manifest, class_names)
    yield f"{manifest.preprocess_name}/config.pbtxt", triton.preprocess_config(manifest)
    yield f"{manifest.alarm_name}/config.pbtxt", triton.alarm_config(manifest, class_names)
    yield f"{manifest.classifier_name}/config.pbtxt", triton.classifier_config(manifest)
    for target, built_in in BUILT_IN.items():
        profile = manifest.profile
        if profile.precision == "int8" and built_in.provider != "cpu":
            continue  # TensorRT refuses unsigned activations, and CUDA would compute in float32
        if profile.provider != built_in.provider:
            profile = replace(profile, provider=built_in.provider, instances=built_in.instances, threads=0)
        text = triton.classifier_config(replace(manifest, profile=profile))
        yield f"{manifest.classifier_name}/configs/{target}.pbtxt", text
    for_python = replace(manifest.profile, provider="cuda" if manifest.profile.provider != "cpu" else "cpu")
    text = triton.classifier_config(replace(manifest, profile=for_python), backend="python")
    yield f"{manifest.classifier_name}/configs/python.pbtxt", text


def foreign_files(repository: Repository) -> list[str]:
    """Files of a repository that the installed version would not have written so, and files too many.

    The numbers of instances and threads may be those of another machine. Behind the name of the graph it says
    in brackets what in it is foreign.

    Raises:
        RepositoryError: Nothing can be said, because the manifest or a configuration contradicts itself; or
            the graph would read files that the manifest does not list.
    """
    manifest, class_names = repository.manifest, _class_names(repository)
    expected = written_files(manifest, class_names)
    graph = f"{manifest.classifier_name}/1/model.onnx"
    data = {
        PARITY,
        ATTESTATION,
        BOM,
        graph,
        f"{manifest.classifier_name}/1/{WEIGHTS}",  # the graph says whether it is its own
        f"{manifest.preprocess_name}/warmup/{WARMUP}",
    }
    golden = f"{manifest.name}/1/{GOLDEN_FOLDER}/"
    foreign = [name for name in expected if name not in manifest.files]
    for name in manifest.files:
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
        image_size=manifest.preprocess.image_size,
        classes=manifest.classes,
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


def _class_names(repository: Repository) -> tuple[str, ...]:
    manifest = repository.manifest
    file = repository.path / repository.name / "config.pbtxt"
    try:
        text = read_regular_file(file, max_bytes=_MAX_BYTES).decode()
        said = json.loads(triton.parse_config(text).parameters["class_names"].string_value)
        names = tuple(str(name) for name in said)
        if len(names) != manifest.classes or not all(0 <= index < len(names) for index in manifest.suspects):
            raise ValueError("other classes than the manifest says")
        return names
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
