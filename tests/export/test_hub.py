"""What is fetched of a hub id, from a hub on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny

NAME, COMMIT = "some/pipeline", "0" * 40
OPEN = f"from export.sources import open_pipeline; print(open_pipeline({NAME!r}).folder)"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    """Serve the folder `repository` as the hub does."""
    repository = tmp_path / "repository"

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            names = [str(f.relative_to(repository)) for f in repository.rglob("*") if f.is_file()]
            if path == f"/api/models/{NAME}/tree/main":
                self._answer(json.dumps([_listed(name) for name in names]).encode())
            elif path == f"/api/models/{NAME}/revision/main":
                siblings = [{"rfilename": name} for name in names]
                told = {"id": NAME, "sha": COMMIT, "siblings": siblings}
                self._answer(json.dumps(told).encode())
            else:
                file = path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")
                self._answer((repository / file).read_bytes(), file.replace("/", "-"))

        do_HEAD = do_GET

        def _answer(self, body: bytes, tag: str = "") -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{tag}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _listed(name: str) -> dict[str, object]:
    return {"type": "file", "path": name, "size": 1, "oid": name}


def opened(hub: ThreadingHTTPServer, home: Path, *, offline: bool) -> Path:
    """Open the hub's pipeline in a process of its own, since settings are read once."""
    ran = subprocess.run(
        [sys.executable, "-c", OPEN],
        env={
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": str(int(offline)),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return Path(ran.stdout.strip())


def test_pickles_are_fetched_where_a_part_has_no_safetensors(hub, tmp_path):
    folder = tiny.make_pipeline(tmp_path / "repository")
    safe = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(safe), safe.with_suffix(".bin"))
    safe.rename(safe.with_suffix(".fp16.safetensors"))
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"the same again")
    fetched = opened(hub, tmp_path / "home", offline=False)
    assert {str(file.relative_to(fetched)) for file in fetched.glob("*/*model*")} == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.safetensors",
    }
    # What is kept serves without a network, and with a hub that is gone.
    assert opened(hub, tmp_path / "home", offline=True) == fetched
    hub.shutdown()
    hub.server_close()
    assert opened(hub, tmp_path / "home", offline=False) == fetched
