"""A Ray cluster: connected to, or refused within seconds and with a reason."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any
from urllib.parse import urlsplit

from cbpt_runtime.errors import ConfigError, missing_extra

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
