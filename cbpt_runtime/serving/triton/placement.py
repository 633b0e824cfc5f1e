"""Which configuration of a repository a server can run here, with how many instances and threads.

A view of the repository is served: a folder with a plain name whose links lead to the hashed files, because
Triton's python backend puts the path into the command line of a shell. A repository says how many instances
and threads the machine it was exported on had; where this machine differs, the configurations of the view
have its numbers. Nothing else differs.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from cbpt_runtime.errors import ConfigError, RepositoryError, ServingError
from cbpt_runtime.export.cpus import usable_cpus
from cbpt_runtime.export.manifest import Repository
from cbpt_runtime.serving.config import ServeConfig
from cbpt_runtime.serving.triton.servers import RELEASE, TritonServer

MAX_DECODERS = 4
_THREADS = "intra_op_thread_count"
_NEEDED_BY_STUBS = {"numpy": "numpy", "PIL": "Pillow", "onnxruntime": "onnxruntime"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How a repository is served on this machine.

    Attributes:
        config_name: For `--model-config-name`; None means every ``config.pbtxt``.
        backend: That runs the graph.
        provider: Execution provider of the graph.
        instances: Copies of the classifier.
        threads: Of each copy on a CPU.
        decoders: Processes that decode images.
        counters: Processes that count alarms, and look twice where that was exported.
        configs: Configurations (by model) that differ from the repository's.
    """

    config_name: str | None
    backend: str
    provider: str
    instances: int
    threads: int
    decoders: int
    configs: dict[str, str]
    counters: int = 1

    @property
    def processes(self) -> int:
        """Processes of the python backend: decoders, alarm counters, and perhaps the classifier."""
        return self.decoders + self.counters + (self.instances if self.backend == "python" else 0)

    def describe(self) -> str:
        """In words, for people."""
        copies = f"{self.instances} instance{'s' if self.instances > 1 else ''}"
        where = (
            f" of {self.threads} thread{'s' if self.threads > 1 else ''}" if self.provider == "cpu" else ""
        )
        return f"{self.backend} backend on {self.provider}, {copies}{where}, {self.decoders} decoding"


def place(repository: Repository, server: TritonServer, config: ServeConfig) -> Placement:
    """Choose what the server's backends can run and give each instance its share of the CPUs.

    Raises:
        ConfigError: The profile asked for is not one of the repository's, or the server cannot run it.
        ServingError: The server lacks a backend every repository needs.
    """
    name = _config_name(server, config)
    classifier = _read(repository, f"{repository.name}_classifier", name)
    decoder = _read(repository, f"{repository.name}_preprocess", name)
    profile = repository.manifest.profile
    provider = classifier.parameters["provider"].string_value
    instances = config.instances or classifier.instance_group[0].count
    threads = int(classifier.parameters[_THREADS].string_value)
    decoders = decoder.instance_group[0].count
    if provider == "cpu":
        threads = profile.threads or max(1, usable_cpus() // instances)
    if not profile.decoders:
        decoders = min(MAX_DECODERS, usable_cpus())
    configs = {}
    if instances != classifier.instance_group[0].count or str(threads) != (
        classifier.parameters[_THREADS].string_value
    ):
        classifier.instance_group[0].count = instances
        classifier.parameters[_THREADS].string_value = str(threads)
        configs[classifier.name] = _text(classifier)
    if decoders != decoder.instance_group[0].count:
        decoder.instance_group[0].count = decoders
        configs[decoder.name] = _text(decoder)
    return Placement(
        config_name=name,
        backend=classifier.backend,
        provider=provider,
        instances=instances,
        threads=threads,
        decoders=decoders,
        configs=configs,
        counters=_read(repository, f"{repository.name}_alarm", name).instance_group[0].count,
    )


def lay_out(repository: Repository, placement: Placement, folder: Path) -> Path:
    """Return the folder to name as `--model-repository`: a view of the repository in `folder`."""
    for model in repository.manifest.models:
        (folder / model).mkdir(parents=True)
        paths = (PurePosixPath(name).parts for name in repository.manifest.files)
        entries = {parts[1] for parts in paths if parts[0] == model and len(parts) > 1}
        for name in sorted(entries - {"config.pbtxt", "configs"}):
            (folder / model / name).symlink_to((repository.path / model / name).absolute())
        chosen = _config_file(repository, model, placement.config_name)
        text = placement.configs.get(model) or chosen.read_text(encoding="utf-8")
        (folder / model / "config.pbtxt").write_text(text, encoding="utf-8")
        if placement.config_name is not None:
            (folder / model / "configs").mkdir()
            (folder / model / "configs" / f"{placement.config_name}.pbtxt").write_text(text, "utf-8")
    return folder


def _config_name(server: TritonServer, config: ServeConfig) -> str | None:
    if "python" not in server.backends:
        raise ServingError(
            expected="a Triton with the python backend, which decodes the images",
            got=f"{server.executable} with {', '.join(sorted(server.backends)) or 'no backend'}",
            fix=f"Use {RELEASE}.",
        )
    if config.profile == "python" or (config.profile is None and "onnxruntime" not in server.backends):
        _check_stub_packages(server)
        return "python"
    if "onnxruntime" not in server.backends:
        raise ConfigError(
            expected=f"a Triton with the onnxruntime backend, which profile {config.profile!r} needs",
            got=f"{server.executable} with {', '.join(sorted(server.backends))}",
            fix=f"Leave --profile out to serve the same graph through the python backend, or use {RELEASE}.",
        )
    return config.profile


def _check_stub_packages(server: TritonServer) -> None:
    """Check the wheel's stub, which runs this Python's packages; another server's are its own business."""
    missing = [name for module, name in _NEEDED_BY_STUBS.items() if not importlib.util.find_spec(module)]
    if server.wheel is None:
        return
    if "numpy" not in missing and int(metadata.version("numpy").partition(".")[0]) > 1:
        raise ServingError(
            expected="numpy 1, which the python backend of nvidia-pytriton's server was built for",
            got=f"numpy {metadata.version('numpy')}",
            fix="Install `cbpt-runtime[server]` where `serve` runs, or use another server.",
        )
    if missing:
        raise ServingError(
            expected="numpy, Pillow and onnxruntime for Triton's python backend",
            got=f"no {', no '.join(missing)}",
            fix="Install cbpt-runtime with its dependencies into the environment that runs `serve`.",
        )


def _config_file(repository: Repository, model: str, name: str | None) -> Path:
    special = repository.path / model / "configs" / f"{name}.pbtxt"
    return special if name is not None and special.is_file() else repository.path / model / "config.pbtxt"


def _read(repository: Repository, model: str, name: str | None) -> Any:
    from google.protobuf import text_format

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # grpc's own
        from tritonclient.grpc import model_config_pb2

    file = _config_file(repository, model, name)
    try:
        config = text_format.Parse(file.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
        if config.name != model or not config.instance_group:
            raise ValueError(f"one of {config.name!r} with {len(config.instance_group)} instance groups")
        if model == f"{repository.name}_classifier":
            int(config.parameters[_THREADS].string_value)
    except (OSError, ValueError, text_format.ParseError) as error:
        raise RepositoryError(
            expected=f"the configuration of {model} in {file}",
            got=str(error),
            fix="Export the bundle again with `cbpt-runtime export`.",
        ) from error
    return config


def _text(config: Any) -> str:  # not that of `export.triton`, which needs onnx: a serving container has none
    from google.protobuf import text_format

    return str(text_format.MessageToString(config, use_index_order=False))
