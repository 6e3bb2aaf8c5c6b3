"""`funnelrec serve`: words of the command line to the settings of a server."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from funnelrec.serve.app import Settings
from funnelrec.serve.server import Place, allowed_hosts, is_loopback, serve

__all__ = ["serve_folder"]

MOST_THREADS = 4


def serve_folder(
    folder: Path,
    *,
    host: str,
    port: int,
    token_env: str | None,
    insecure: bool,
    threads: int | None,
    allow_host: Sequence[str],
    place: dict[str, Any],
    **settings: Any,
) -> None:
    """Serve until told to stop. Raises ValueError for what would open the server to strangers unasked."""
    token = None if token_env is None else os.environ.get(token_env, "")
    if token is not None and len(token) < 8:
        raise ValueError(f"the variable {token_env} must hold a token of 8 characters or more; export it first")
    if not is_loopback(host) and token is None and not insecure:
        raise ValueError(
            f"--host {host} lets others in, and there is no token; give --token-env NAME, or --insecure to mean it"
        )
    if threads is None:
        threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")  # to stderr
    hosts = allowed_hosts(host, list(allow_host))
    serve(
        folder,
        Settings(token=token, hosts=hosts, threads=threads, **settings),
        Place(host=host, port=port, **place),
    )
