"""Everything that is decided and checked before a server is started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cbpt_runtime.export.manifest import Repository
from cbpt_runtime.serving.config import ServeConfig, take_ports
from cbpt_runtime.serving.triton.command import Command, check_exposure, make_command, region_bytes
from cbpt_runtime.serving.triton.endpoint import Endpoint
from cbpt_runtime.serving.triton.placement import Placement, place
from cbpt_runtime.serving.triton.servers import TritonServer, find_server
from cbpt_runtime.trust import ANYONE, Trust, open_repository


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything decided before a server is started.

    Attributes:
        repository: What is served; its hashes were checked.
        server: The program that serves it.
        config: The operator's settings, with the ports really used.
        placement: Backend, instances and threads on this machine.
        region_bytes: Shared memory of each python-backend process to begin with.
        foreign: Files with code, configurations or a graph of somebody else that the operator lets in.
    """

    repository: Repository
    server: TritonServer
    config: ServeConfig
    placement: Placement
    region_bytes: int
    foreign: tuple[str, ...] = ()

    def command(self, *, repository: Path, backends: Path, endpoint: Endpoint | None = None) -> Command:
        """The command line; without an endpoint Triton itself listens on the public ports, unguarded."""
        config = self.config
        return make_command(
            self.server,
            config,
            self.placement,
            endpoint=endpoint
            or Endpoint(
                address=str(config.address),
                http_port=config.http_port,
                grpc_port=config.grpc_port,
                metrics_port=config.metrics_port,
            ),
            repository=repository,
            backends=backends,
            region_bytes=self.region_bytes,
        )


def make_plan(
    repository: str | Path, config: ServeConfig, *, trust: Trust = ANYONE, must_be_free: bool = True
) -> Plan:
    """Check everything that can be checked before a server is started.

    Args:
        repository: What `cbpt-runtime export` wrote.
        config: Settings.
        trust: What the repository has to show.
        must_be_free: Whether the ports must be free now; not where the command is only shown.

    Raises:
        RepositoryError: A file of the repository is missing, changed, new, or not what this version writes;
            the text names it.
        TrustError: It is not the trusted one.
        ConfigError: No tritonserver, a taken port, or settings that must not be combined.
        ServingError: The tritonserver does not run, or lacks a backend.
    """
    from cbpt_runtime.export.written import require_own_files  # takes onnx along; a client needs none

    checked = open_repository(repository, trust)
    foreign = require_own_files(checked, allow_foreign_code=config.allow_foreign_code)
    server = find_server(config.tritonserver)
    check_exposure(server, config)
    placement = place(checked, server, config)
    return Plan(
        repository=checked,
        server=server,
        config=take_ports(config, must_be_free=must_be_free),
        placement=placement,
        region_bytes=region_bytes(checked, placement),
        foreign=tuple(foreign),
    )
