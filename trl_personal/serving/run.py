"""Runs the server: where it listens, what it logs, and how it stops."""

import logging
import math
import socket
import sys

import uvicorn

from .gate import LOOPBACK, Limits
from .interface import Engine
from .keys import KeyFile
from .server import create_app


logger = logging.getLogger(__name__)

CONNECTIONS_PER_ANSWER = 4  # beyond it, connections are answered with status 503 at once


def check_address(host: str, keys: KeyFile | None) -> None:
    """
    Make sure that a server without keys is for this machine only.

    Raises:
        `ValueError`: if it is not.

    ```python
    >>> check_address("127.0.0.1", None)
    ```
    """
    if keys is None and host not in LOOPBACK:
        raise ValueError(
            f"Without `keys`, whoever reaches the server may ask for every user, so it listens on {LOOPBACK[0]} only, not on "
            f"{host}. Make a key (`trl-personal key keys.json --name app --all_users`) and give the file as `keys`."
        )


def open_socket(host: str, port: int, keys: KeyFile | None) -> socket.socket:
    """
    Take an address, before a model is loaded; nobody can connect until the server runs.

    Args:
        host (`str`): The address to listen on.
        port (`int`): The port to listen on; 0 takes a free one.
        keys ([`KeyFile`], *optional*): The API keys.

    Raises:
        `ValueError`: if there are no keys and `host` is not this machine. `OSError`: if the address cannot be had.
    """
    check_address(host, keys)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named: with it every answer waits 40 ms for the client
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise OSError(
            f"The server cannot listen on {host}, port {port}: {error}. Take another with `port`."
        ) from error
    return listener


def run_server(
    engine: Engine, listener: socket.socket, keys: KeyFile | None = None, limits: Limits | None = None
) -> None:
    """
    Serve until SIGTERM or Ctrl-C; then take no new request, finish those in progress, and return.

    Args:
        engine ([`~serving.interface.Engine`]): Writes the answers.
        listener (`socket`): Where to listen, of [`open_socket`].
        keys ([`KeyFile`], *optional*): The API keys.
        limits ([`Limits`], *optional*): What it takes on.
    """
    limits = limits or Limits()
    log_to_stderr()
    config = uvicorn.Config(
        create_app(engine, keys, limits),
        access_log=False,  # ours has no path in it that a client wrote
        log_config=None,
        server_header=False,
        limit_concurrency=CONNECTIONS_PER_ANSWER * limits.max_answers,
        timeout_graceful_shutdown=math.ceil(limits.max_seconds),
        timeout_keep_alive=15,
        h11_max_incomplete_event_size=64 * 1024,
    )
    host, port = listener.getsockname()[:2]
    logger.info("%s, %d users, on http://%s:%d", engine.name, engine.num_users, host, port)
    uvicorn.Server(config).run(sockets=[listener])


def log_to_stderr() -> None:
    """Let the server's own lines, and uvicorn's, go to the standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in ("trl_personal", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True
