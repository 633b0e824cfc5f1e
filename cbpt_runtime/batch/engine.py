"""Daft, asked to tell nobody that it runs, on this machine or on a Ray cluster."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

from cbpt_runtime.errors import ConfigError

# Both send messages home, and draw on the terminal, unless told not to.
_QUIET = {
    "DO_NOT_TRACK": "1",
    "DAFT_PROGRESS_BAR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
}
_BATCH_EXTRA = "Install it with `pip install 'cbpt-runtime[batch]'`."
_CLUSTER_EXTRA = "Install it with `pip install 'cbpt-runtime[cluster]'`."


def load_daft() -> ModuleType:
    """Import the package Daft.

    Raises:
        ConfigError: It is not installed.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import daft
    except ImportError as error:
        raise ConfigError(
            expected="the package daft for batches of images", got=str(error), fix=_BATCH_EXTRA
        ) from error
    return daft


def start_engine(cluster: str | None) -> ModuleType:
    """Daft, running where it should. A process can use one place only.

    Args:
        cluster: Address of a Ray cluster, for example ``ray://head:10001``; this process when None.

    Raises:
        ConfigError: Daft, or Ray for a cluster, is not installed; or the cluster does not answer.
    """
    daft = load_daft()
    try:
        if cluster is None:
            daft.set_runner_native()  # a thread for each CPU it may use, as Linux says
        else:
            import ray  # noqa: F401  # so that its absence has a name

            daft.set_runner_ray(address=cluster, noop_if_initialized=True)
    except ImportError as error:
        raise ConfigError(
            expected="the package ray for --cluster", got=str(error), fix=_CLUSTER_EXTRA
        ) from error
    except Exception as error:  # whatever Ray or Daft's Rust raises
        if daft.runners.get_or_create_runner().name == ("native" if cluster is None else "ray"):
            return daft  # it runs there already
        raise ConfigError(
            expected="this machine" if cluster is None else f"a Ray cluster at {cluster}",
            got=" ".join(str(error).split())[:300],
            fix="Check the address; a process that used Daft on one place cannot go on at another.",
        ) from error
    return daft


def io_config() -> Any:
    """How object stores are reached: as the environment says, AWS_ENDPOINT_URL included."""
    daft = load_daft()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint:
        return daft.io.IOConfig()
    s3 = daft.io.S3Config.from_env().replace(endpoint_url=endpoint, use_ssl=endpoint.startswith("https"))
    return daft.io.IOConfig(s3=s3)
