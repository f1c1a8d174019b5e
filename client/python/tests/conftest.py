# SPDX-License-Identifier: Apache-2.0
"""Servers that the tests of the client talk to."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_service import FakeService, serve

from dynsplit.sessions import SessionClient

_ROOT = Path(__file__).resolve().parents[3]


def _binary() -> Path | None:
    """$DYNSPLITD, or the one that ./run built; None where it is missing or has no sessions."""
    path = Path(os.environ.get("DYNSPLITD", _ROOT / "build/dev/server/dynsplitd"))
    if not path.exists():
        return None
    usage = subprocess.run([path, "--help"], capture_output=True, text=True, check=False)
    return path if "--regions" in usage.stdout else None


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[tuple[FakeService, SessionClient]]:
    """The stand-in and a client of it."""
    service = FakeService()
    server = serve(service, f"unix:{tmp_path}/fake.sock")
    with SessionClient(f"unix:{tmp_path}/fake.sock") as client:
        yield service, client
    server.stop(None)


@pytest.fixture(params=["fake", "dynsplitd"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SessionClient]:
    """A client of the stand-in, and of the real server on the CPU."""
    if request.param == "fake":
        yield request.getfixturevalue("fake")[1]
        return
    binary = _binary()
    if binary is None:
        pytest.skip("no dynsplitd with sessions: set DYNSPLITD")
    path = tmp_path / "server.sock"
    command = [binary, "--backend=cpu", "--threads=2", "--listen=127.0.0.1:0"]
    command += ["--metrics-listen=127.0.0.1:0", f"--unix-socket={path}", "--regions=shm"]
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_for(path, server)
        with SessionClient(f"unix:{path}") as connected:
            yield connected
    finally:
        server.terminate()
        try:
            status = server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            raise
    # What a sanitizer found makes it fail, too.
    assert status == 0, (tmp_path / "server.log").read_text()


def _wait_for(path: Path, server: subprocess.Popen[bytes]) -> None:
    for _ in range(100):
        assert server.poll() is None, "dynsplitd ended"
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(path))
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError("dynsplitd does not listen")
