"""The programs that share work out: Daft, told to tell nobody, and Ray, reached or refused in seconds."""

from __future__ import annotations

import logging
import os
import socket
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from cbpt_runtime.errors import ConfigError, missing_extra

# Daft sends messages home, and draws on the terminal, unless told not to.
_QUIET = {"DO_NOT_TRACK": "1", "DAFT_PROGRESS_BAR": "0"}
_PATIENCE_S = 5.0
_UNASKED = ("auto", "local")  # Ray finds, or starts, these itself


def reach_cluster(address: str) -> Any:
    """Ray, connected to a cluster until the process ends; to that of an earlier call where there was one.

    Args:
        address: ``ray://HOST:10001``, ``HOST:6379``, or ``auto`` for the cluster of this machine.

    Returns:
        The module ``ray``.

    Raises:
        ConfigError: Ray is not installed, or the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it sends messages home otherwise
    try:
        import ray
    except ImportError as error:
        raise missing_extra("the package ray for --cluster", "cluster", error) from error
    if ray.is_initialized():
        return ray
    try:
        _knock(address)
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:  # whatever Ray raises
        raise ConfigError(
            expected=f"a Ray cluster at {address}",
            got=" ".join(str(error).split())[:300],
            fix="Check the address, or leave --cluster and RAY_ADDRESS away.",
        ) from error
    return ray


def _knock(address: str) -> None:
    """Connect, once: Ray itself tries for minutes.

    Raises:
        OSError: Nobody is there.
        ValueError: It is no address.
    """
    if address in _UNASKED:
        return
    place = urlsplit(address if "://" in address else f"//{address}")
    if place.hostname is None or place.port is None:
        raise ValueError("an address without a host and a port")
    socket.create_connection((place.hostname, place.port), timeout=_PATIENCE_S).close()


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
        raise missing_extra("the package daft for batches of images", "batch", error) from error
    return daft


def start_engine(cluster: str | None) -> ModuleType:
    """Daft, running where it should. A process can use one place only.

    Args:
        cluster: Address of a Ray cluster, for example ``ray://head:10001``; this process when None.

    Raises:
        ConfigError: Daft, or Ray for a cluster, is not installed; or the cluster does not answer.
    """
    daft = load_daft()
    if cluster is not None:
        reach_cluster(cluster)
    try:
        if cluster is None:
            daft.set_runner_native()  # a thread for each CPU it may use, as Linux says
        else:
            daft.set_runner_ray(noop_if_initialized=True)
    except Exception as error:  # of Daft's Rust
        if daft.runners.get_or_create_runner().name == ("native" if cluster is None else "ray"):
            return daft  # it runs there already
        raise ConfigError(
            expected="this machine" if cluster is None else f"a Ray cluster at {cluster}",
            got=" ".join(str(error).split())[:300],
            fix="A process that used Daft on one place cannot go on at another: begin a new one.",
        ) from error
    return daft


def io_config(*, s3_tries: int = 25) -> Any:
    """How object stores are reached: as the environment says, AWS_ENDPOINT_URL and HF_TOKEN included.

    Args:
        s3_tries: Of a request to S3, which is slowed down where many are made; 25 take three minutes.
    """
    daft = load_daft()
    s3 = daft.io.S3Config(num_tries=s3_tries)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        own = daft.io.S3Config.from_env()
        s3 = own.replace(endpoint_url=endpoint, use_ssl=endpoint.startswith("https"), num_tries=s3_tries)
    return daft.io.IOConfig(s3=s3, hf=daft.io.HuggingFaceConfig(token=os.environ.get("HF_TOKEN")))
