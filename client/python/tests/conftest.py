# SPDX-License-Identifier: Apache-2.0
"""Servers that the tests of the client talk to."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_service import FakeService, serve

from dynsplit import Client
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
    with SessionClient(request.getfixturevalue("daemon").unix) as connected:
        yield connected


@dataclasses.dataclass(frozen=True)
class Daemon:
    """Addresses of a running dynsplitd."""

    unix: str
    tcp: str
    region_socket: str  # path


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A server of its own on the CPU; ends cleanly, or the test fails."""
    with run_daemon(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a server that the tests of a module share."""
    with (
        run_daemon(tmp_path_factory.mktemp("daemon")) as running,
        Client(running.unix) as connected,
    ):
        yield connected


@contextlib.contextmanager
def run_daemon(folder: Path, *options: str) -> Iterator[Daemon]:
    """dynsplitd with a socket in `folder`; what a sanitizer found fails the test, too."""
    binary = _binary()
    if binary is None:
        pytest.skip("no dynsplitd with sessions: set DYNSPLITD")
    path = folder / "server.sock"
    port = _free_port()
    command = [binary, "--backend=cpu", "--threads=2", f"--listen=127.0.0.1:{port}"]
    command += ["--metrics-listen=127.0.0.1:0", f"--unix-socket={path}", "--regions=shm"]
    command += [f"--region-socket={folder / 'regions.sock'}"]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen([*command, *options], stdout=log, stderr=log)
    try:
        _wait_for(path, server)
        yield Daemon(f"unix:{path}", f"127.0.0.1:{port}", str(folder / "regions.sock"))
    finally:
        server.terminate()
        try:
            status = server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            raise
    assert status == 0, (folder / "server.log").read_text()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


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
