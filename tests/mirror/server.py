"""A real S3-compatible server (moto's) in a process of its own on 127.0.0.1, ended by whoever started it."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import time
from typing import Any

__all__ = ["S3"]


class S3:
    """The server and what a client needs to reach it."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.options: dict[str, Any] = {
            "key": "test",
            "secret": "test",
            "endpoint_url": f"http://127.0.0.1:{self.port}",
        }
        try:
            self._wait()
            self.files().mkdir("bucket")
        except BaseException:
            self.stop()
            raise

    def files(self) -> Any:
        """A client."""
        import s3fs

        return s3fs.S3FileSystem(**self.options)

    def fresh_url(self) -> str:
        """A place that nobody has used."""
        return f"s3://bucket/{secrets.token_hex(8)}/run"

    def stop(self) -> None:
        """End the server."""
        self.process.kill()
        self.process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert self.process.poll() is None, "the server ended by itself"
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.05)
