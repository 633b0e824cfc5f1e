"""Settings, placement and the command line, for servers of several ages."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.errors import ConfigError, RepositoryError, ServingError
from cbpt_runtime.export.manifest import Repository, read_repository
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.repository import export_bundle
from cbpt_runtime.serving.config import Endpoint, ServeConfig, private_endpoint, take_ports
from cbpt_runtime.serving.triton import command, placement
from cbpt_runtime.serving.triton.command import (
    check_exposure,
    make_command,
    region_bytes,
    require_plain,
    shell_text,
)
from cbpt_runtime.serving.triton.placement import lay_out, place
from cbpt_runtime.serving.triton.servers import TritonServer
from cbpt_runtime.serving.triton.startup import make_plan

FLAGS_2_51 = frozenset(
    (
        "--model-repository",
        "--backend-directory",
        "--model-config-name",
        "--model-control-mode",
        "--strict-readiness",
        "--disable-auto-complete-config",
        "--exit-on-error",
        "--exit-timeout-secs",
        "--http-address",
        "--http-port",
        "--grpc-address",
        "--grpc-port",
        "--metrics-address",
        "--metrics-port",
        "--allow-sagemaker",
        "--allow-vertex-ai",
        "--allow-gpu-metrics",
        "--http-restricted-api",
        "--grpc-restricted-protocol",
        "--backend-config",
    )
)
FLAGS_2_68 = FLAGS_2_51 | {"--http-max-input-size", "--grpc-max-response-pool-size", "--allow-client-shm"}


def server(
    flags: frozenset[str] = FLAGS_2_68,
    backends: tuple[str, ...] = ("python", "onnxruntime"),
    version: str | None = "2.69.0",
) -> TritonServer:
    return TritonServer(
        executable=Path("/opt/tritonserver/bin/tritonserver"),
        origin="the official image",
        flags=flags,
        backends=frozenset(backends),
        version=version,
    )


@pytest.fixture(scope="module")
def repository(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    output = tmp_path_factory.mktemp("commands") / "repository"
    export_bundle(tiny_bundle, output, name="shapes", profile=Profile(max_batch=4))
    return read_repository(output)


@pytest.fixture(autouse=True)
def _two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "usable_cpus", lambda: 2)


ENDPOINT = Endpoint(
    address="127.1.2.3", http_port=41000, grpc_port=43000, metrics_port=42000, secret="s3cret"
)


def arguments(
    repository: Repository, program: TritonServer, endpoint: Endpoint = ENDPOINT, **settings: Any
) -> list[str]:
    config = ServeConfig(**settings)
    made = make_command(
        program,
        config,
        place(repository, program, config),
        endpoint=endpoint,
        repository=Path("/models"),
        backends=Path("/opt/tritonserver/backends"),
        region_bytes=2**20,
    )
    return list(made.arguments)


def test_the_command_is_hardened(repository: Repository) -> None:
    found = arguments(repository, server())
    for flag in (
        "--http-address=127.1.2.3",
        "--http-port=41000",
        "--grpc-address=127.1.2.3",
        "--grpc-port=43000",
        "--metrics-address=127.1.2.3",
        "--metrics-port=42000",
        "--http-restricted-api=health,metadata,inference,model-config,model-repository,statistics"
        ":cbpt-guard=s3cret",
        "--grpc-restricted-protocol=health,metadata,inference,model-config,model-repository,statistics"
        ":cbpt-guard=s3cret",
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        "--strict-readiness=true",
        "--exit-on-error=true",
        "--allow-sagemaker=false",
        "--allow-vertex-ai=false",
        "--allow-client-shm=false",
        f"--http-max-input-size={2**26}",
    ):
        assert flag in found
    assert not any(flag.startswith("--model-config-name") for flag in found)


def test_triton_itself_listens_on_the_loopback_wherever_the_service_does(repository: Repository) -> None:
    found = arguments(repository, server(), host="0.0.0.0")
    assert {flag for flag in found if "-address=" in flag} == {
        "--http-address=127.1.2.3", "--metrics-address=127.1.2.3", "--grpc-address=127.1.2.3",
    }  # fmt: skip


def test_a_private_endpoint_is_another_one_each_time() -> None:
    made = [private_endpoint() for _ in range(20)]
    assert len({endpoint.address for endpoint in made}) > 15
    assert len({endpoint.secret for endpoint in made}) == 20
    for endpoint in made:
        assert endpoint.address.startswith("127.")
        assert len({endpoint.http_port, endpoint.grpc_port, endpoint.metrics_port}) == 3
        assert endpoint.secret not in repr(endpoint)


def test_an_old_server_gets_no_flag_it_does_not_know(repository: Repository) -> None:
    found = arguments(repository, server(FLAGS_2_51, ("python",)))
    assert {flag.partition("=")[0] for flag in found[1:]} <= FLAGS_2_51
    assert "--model-config-name=python" in found


def test_the_closed_endpoints_have_a_new_secret_each_time(repository: Repository) -> None:
    first, second = (
        [flag for flag in arguments(repository, server()) if "cbpt-closed" in flag] for _ in range(2)
    )
    assert all("shared-memory,trace,logging:" in flag for flag in first)
    assert not set(first) & set(second)


@pytest.mark.parametrize("profile", [None, "cpu", "cuda", "tensorrt", "python"])
def test_the_profile_chooses_the_configuration(profile: str | None, repository: Repository) -> None:
    chosen = place(repository, server(), ServeConfig(profile=profile))
    assert chosen.config_name == profile
    assert chosen.backend == ("python" if profile == "python" else "onnxruntime")
    assert chosen.provider == (profile if profile in ("cuda", "tensorrt") else "cpu")


def test_instances_share_the_cpus(repository: Repository) -> None:
    one, two = (place(repository, server(), ServeConfig(instances=number)) for number in (1, 2))
    assert (one.threads, two.threads) == (2, 1)


def test_other_numbers_than_the_repositorys_are_served_from_a_view_of_it(
    repository: Repository, tmp_path: Path
) -> None:
    chosen = place(repository, server(backends=("python",)), ServeConfig(instances=2))
    folder = lay_out(repository, chosen, tmp_path / "view")
    for name in ("config.pbtxt", "configs/python.pbtxt"):
        text = (folder / "shapes_classifier" / name).read_text()
        assert "count: 2" in text
        assert 'string_value: "1"' in text
    assert (folder / "shapes_classifier" / "1").resolve() == repository.path / "shapes_classifier" / "1"
    assert (folder / "shapes_classifier" / "labels.txt").is_file()


def test_the_repositorys_own_numbers_are_served_from_a_view_too(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cbpt_runtime.export.cpus import usable_cpus

    monkeypatch.setattr(placement, "usable_cpus", usable_cpus)
    chosen = place(repository, server(), ServeConfig())
    assert not chosen.configs
    view = lay_out(repository, chosen, tmp_path / "view")
    assert {path.name for path in view.iterdir()} == set(repository.manifest.models)
    for model in repository.manifest.models:
        config = (repository.path / model / "config.pbtxt").read_text()
        assert (view / model / "config.pbtxt").read_text() == config
        assert (view / model / "1").resolve() == repository.path.resolve() / model / "1"


def test_the_view_holds_what_the_manifest_lists_and_nothing_else(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(repository.path, tmp_path / "copy"))
    (copy / "shapes_classifier" / "2").mkdir()  # Triton would look for a model in it
    (copy / "lost+found").mkdir()
    (copy / "shapes" / ".DS_Store").touch()
    checked = read_repository(copy)
    view = lay_out(checked, place(checked, server(), ServeConfig()), tmp_path / "view")
    assert not (view / "shapes_classifier" / "2").exists()
    assert not (view / "shapes" / ".DS_Store").exists()
    assert (view / "shapes_classifier" / "1" / "model.onnx").is_file()


@pytest.mark.parametrize("character", [*" $`'\"\n;&|<>()*?~#!\\", "é"])
def test_a_path_a_shell_would_read_is_not_printed_as_a_command(character: str) -> None:
    require_plain(Path("/srv/models-1.0/clip_a"))
    with pytest.raises(ConfigError, match="letters, digits"):
        require_plain(Path(f"/srv/a{character}b/models"))


@pytest.mark.parametrize("name", ["x$(id)", "a b", "../x", "", "-x", 7])
def test_a_model_whose_name_a_shell_would_read_is_refused(
    name: object, repository: Repository, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(repository.path, tmp_path / "copy"))
    written = json.loads((copy / "manifest.json").read_text())
    for change in ({"name": name}, {"models": [*repository.manifest.models, name]}):
        (copy / "manifest.json").write_text(json.dumps(written | change))
        with pytest.raises(RepositoryError, match="the name of a model that is none"):
            read_repository(copy)


def test_a_server_without_a_backend_that_is_needed_is_explained(repository: Repository) -> None:
    with pytest.raises(ServingError, match="python backend, which decodes"):
        place(repository, server(backends=("onnxruntime",)), ServeConfig())
    with pytest.raises(ConfigError, match="Leave --profile out"):
        place(repository, server(backends=("python",)), ServeConfig(profile="tensorrt"))


@pytest.mark.parametrize("version", ["2.51.0", "2.68.0", "2.9.0", "1.70.0", "nonsense", None])
def test_only_a_current_server_may_be_opened_to_a_network(version: str | None) -> None:
    for current in ("2.69.0", "2.73.0dev", "2.100.0", "3.0.0"):
        check_exposure(server(version=current), ServeConfig(host="0.0.0.0"))
    with pytest.raises(ConfigError, match=r"a Triton older than 2\.69: it lacks published security fixes"):
        check_exposure(server(version=version), ServeConfig(host="0.0.0.0"))
    for host in ("127.0.0.1", "localhost", "127.3.2.1"):
        check_exposure(server(version=version), ServeConfig(host=host))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"http_port": 70000}, "http_port = 70000"),
        ({"http_port": 8001}, "one port twice"),
        ({"host": "example.org"}, "an IPv4 address, or localhost"),
        ({"host": "::1"}, "an IPv4 address, or localhost"),
        ({"host_names": frozenset({"a.org", "b.org:80"})}, r"allowed host = 'b\.org:80'"),
        ({"profile": "gpu"}, "profile = 'gpu'"),
        ({"instances": 0}, "instances = 0"),
        ({"drain_timeout_s": float("nan")}, "drain_timeout_s = nan"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ServeConfig(**settings)


def test_urls_lead_this_machine_to_the_server() -> None:
    assert ServeConfig(host="0.0.0.0").http_url == "http://127.0.0.1:8000"
    assert ServeConfig(host="localhost").metrics_url == "http://127.0.0.1:8002/metrics"


def test_zero_takes_free_ports_and_a_taken_port_is_named() -> None:
    taken = take_ports(ServeConfig(http_port=0, grpc_port=0, metrics_port=0))
    assert len({taken.http_port, taken.grpc_port, taken.metrics_port} - {0}) == 3
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--grpc-port on 127\.0\.0\.1; got {port}: address already"):
            take_ports(ServeConfig(http_port=0, grpc_port=port, metrics_port=0))


def test_too_little_shared_memory_is_said_before_the_start(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = place(repository, server(), ServeConfig())
    assert region_bytes(repository, chosen) == 2**20
    monkeypatch.setattr(command, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(
        command.os, "statvfs", lambda path: type("S", (), {"f_bavail": 1, "f_frsize": 4096})()
    )
    with pytest.raises(ConfigError, match="--shm-size"):
        region_bytes(repository, chosen)


def test_the_printed_command_can_be_pasted() -> None:
    assert shell_text(["/a b/tritonserver", "--x=1"]) == "'/a b/tritonserver' \\\n  --x=1"


def test_a_tampered_repository_is_refused_before_a_server_is_looked_for(
    repository: Repository, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(repository.path, tmp_path / "copy"))
    labels = copy / "shapes" / "labels.txt"
    labels.write_text(labels.read_text().replace("red", "rad"))
    with pytest.raises(RepositoryError, match=r"shapes/labels\.txt was changed"):
        make_plan(copy, ServeConfig(tritonserver=tmp_path / "missing"))
