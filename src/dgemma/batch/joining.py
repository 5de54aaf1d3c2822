"""Joining a Ray cluster: with a token where it wants one, and without a word of Ray's own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from ..errors import ConfigError

LOCAL, AUTO = "local", "auto"
REACH = 5.0  # seconds for an answer from the address
PATIENT = {"health_check_failure_threshold": 100}  # a machine that slept for minutes is not a dead one
STORE = 512 << 20  # bytes of memory for blocks, in a cluster of our own


def connect(address: str) -> bool:
    """Joins the cluster; whether this is to be undone."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # or a thread of Ray's that is late would begin anew
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a cluster of our own; 15 is Ray's choice
    import logging

    import ray

    if ray.is_initialized():
        return False
    more: dict[str, Any] = (
        {"include_dashboard": False, "object_store_memory": STORE, "_system_config": PATIENT}
        if address == LOCAL
        else {}
    )
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with _silence():
            if address != LOCAL:
                _authenticate(address)
            # Workers' output is not ours: it would be among the answers on stdout.
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **more)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"ray: no cluster at {address!r} ({last_line(error)})") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
    import ray._private.worker
    import ray.data

    # Ray prints pages about dead workers to stdout, where answers may be, whatever `log_to_driver` says.
    vars(ray._private.worker)["print_to_stdstream"] = lambda *_args, **_named: None
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return True


def _authenticate(address: str) -> None:
    """Finds out whether a cluster wants a token, and tells Ray, unless RAY_AUTH_MODE says it.

    By itself Ray gives none to a `host:port`; and for `auto` it takes any token that this machine has for the
    cluster's, which one without a token answers with workers that never begin.

    Raises:
        ConfigError: it wants another token than is here.
    """
    from ray import _raylet
    from ray._private.services import canonicalize_bootstrap_address
    from ray.exceptions import AuthenticationError

    inside: Any = _raylet  # it has no types
    where = canonicalize_bootstrap_address(address)
    said = os.environ.get("RAY_AUTH_MODE")
    for mode in ("disabled", "token") if said is None else (said,):
        if mode == "token" and not inside.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
            break  # Ray would end the process
        os.environ["RAY_AUTH_MODE"] = mode
        inside.Config.initialize("")  # it is read once
        try:
            inside.GcsClient(address=where)
        except AuthenticationError:
            continue
        except Exception:
            pass  # `ray.init` says it better
        return
    raise ConfigError(
        f"ray: the cluster at {address!r} wants its own token; copy ~/.ray/auth_token from its head node, or name it "
        "with RAY_AUTH_TOKEN_PATH" + ("" if said in (None, "token") else f", and set RAY_AUTH_MODE=token, not {said}")
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing on stderr: what Ray's C++ says there when it starts has no level that could be set."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def reach(address: str) -> None:
    """Raises ConfigError where nobody answers; Ray itself would try for a minute."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16 or "://" in host:
        raise ConfigError(f"ray: {address!r} is not local, auto or host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH).close()
    except OSError as error:
        raise ConfigError(f"ray: no cluster at {address!r} ({error.strerror or error})") from None


def last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
