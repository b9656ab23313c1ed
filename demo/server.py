"""A cloud server of the demonstration's own: started, waited for, and stopped whatever happens."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from edge_agent import CloudClient

START_S, STOP_S, POLL_S = 180.0, 10.0, 0.2
_LISTENING = re.compile(r"^listening on (\S+)$", re.MULTILINE)


class DemoError(Exception):
    """The demonstration cannot go on; the message is one sentence."""


@dataclass(slots=True)
class Server:
    """A running `cloud-server serve` and the address that it took."""

    process: subprocess.Popen[bytes]
    log: Path
    address: str = ""

    def stop(self) -> None:
        """End the process: politely first, and for certain."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@contextmanager
def cloud_server(model: Path, log: Path) -> Iterator[Server]:
    """Run `cloud-server serve` for `model` on a free loopback port until the block ends.

    Raises DemoError if it does not come to serve; what it says goes to the file `log`.
    """
    command = [sys.executable, "-m", "cloud_server", "serve"]
    command += ["--address", "127.0.0.1:0", "--model", str(model), "--grace", "2"]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT
        )
    server = Server(process, log)
    try:
        with tqdm(
            desc="starting the cloud", bar_format="{desc}: {elapsed}", leave=False, disable=None
        ) as bar:
            _await(server, bar)
        yield server
    finally:
        server.stop()


def _await(server: Server, bar: tqdm) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            lines = server.log.read_text(errors="replace").strip().splitlines()
            said = lines[-1] if lines else "nothing"
            raise DemoError(f"the cloud server ended before it served, saying: {said}")
        if not server.address and (found := _LISTENING.search(server.log.read_text("utf-8"))):
            server.address = found[1]
        if server.address and _serves(server.address):
            return
        time.sleep(POLL_S)
        bar.refresh()
    raise DemoError(f"the cloud server did not serve within {START_S:g} s; see {server.log}")


def _serves(address: str) -> bool:
    with CloudClient(address) as client:
        return client.healthy()
