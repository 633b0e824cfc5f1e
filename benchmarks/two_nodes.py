"""A Ray cluster of two nodes with a CPU each on this machine, for tests and benchmarks.

    python benchmarks/two_nodes.py

Prints its address, and the one for Ray's client (`ray://`); ends when its standard input does. Whoever uses
it needs the environment of `CLIENT`, because Ray takes the address of a network for one of the loopback
otherwise.

Ray gives up where its helpers take long to start, as they do on a busy machine: its raylet waits 15 seconds
for a port of theirs even where the port was chosen beforehand, because nobody tells it which
(https://github.com/ray-project/ray/issues/65983). Here it is told.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from contextlib import ExitStack
from typing import Any

CLIENT = {
    "DAFT_RAY_WORKER_STARTUP_TIMEOUT": "600",
    "NO_PROXY": "*",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_PATIENCE = {
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_health_check_failure_threshold": "100",
    "RAY_worker_niceness": "0",
    "RAY_worker_register_timeout_seconds": "600",
}
_PORTS = (
    "metrics_agent_port",
    "metrics_export_port",
    "runtime_env_agent_port",
    "dashboard_agent_listen_port",
)


def main() -> None:
    """Start the nodes, and wait."""
    os.environ |= CLIENT | _PATIENCE
    from ray._private import services
    from ray.cluster_utils import Cluster

    start = services.start_ray_process

    def told(command: list[str], process_type: str, **more: Any) -> Any:
        if process_type == "raylet":
            (port,) = re.findall(r"--listen-port=(\d+)", " ".join(command))
            command = [*command, f"--dashboard_agent_listen_port={port}"]
        return start(command, process_type, **more)

    services.start_ray_process = told
    head = node(*_PORTS, "ray_client_server_port")
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**node(*_PORTS))
    print(f"{cluster.address}\nray://127.0.0.1:{head['ray_client_server_port']}", flush=True)
    sys.stdin.read()
    cluster.shutdown()


def node(*ports: str) -> dict[str, Any]:
    """Return settings of one node, on the loopback, with ports by their names."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in ports]
        free = dict(zip(ports, (one.getsockname()[1] for one in sockets), strict=True))
    small = {"num_cpus": 1, "object_store_memory": 200 << 20, "include_dashboard": False}
    return {**small, **free, "node_ip_address": "127.0.0.1"}


if __name__ == "__main__":
    main()
