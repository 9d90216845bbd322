"""Connect to a Ray cluster, or start one on this machine that ends with the process."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator

import ray

from logitstore.errors import OutsideError

# A resource that only a cluster has which `connect` started: no machine will ever join it.
PRIVATE_CLUSTER = "logitstore_private"
_REACH_SECONDS = 10.0


@contextlib.contextmanager
def connect(address: str | None, *, num_cpus: int | None = None) -> Iterator[None]:
    """Hold a connection to Ray for the length of a `with` block.

    Args:
        address: "auto", "host:port" or "ray://host:port"; None starts a cluster of one on this machine.
        num_cpus: CPUs of the cluster that is started; as many as there are by default.
    Raises:
        OutsideError: there is no cluster at the address, or the process was sent SIGTERM, of which Ray makes an exit.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Of calls that nobody asks about any more, because the capture has ended: Ray would print their tracebacks.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    try:
        if address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a laptop's private cluster reports to nobody
            ray.init(
                address="local",
                num_cpus=num_cpus,
                resources={PRIVATE_CLUSTER: 1.0},
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        else:
            _check_reachable(address)
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        where = address or "this machine"
        raise OutsideError(f"Ray at {where}: expected a cluster, found {error}; check --address") from error
    # Ray prints what it has to say, of a lost machine for example, where a command prints its result; some in the end.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield
        except SystemExit as error:
            if error.code != signal.SIGTERM:
                raise
            raise OutsideError(
                "logitstore: expected to come to the end, found that it was asked to stop (SIGTERM); run the command "
                "again to go on"
            ) from None
        finally:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Fail within seconds where nobody listens: Ray itself waits for minutes."""
    host, separator, port = address.rpartition(":")
    if separator and "://" not in address and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()
