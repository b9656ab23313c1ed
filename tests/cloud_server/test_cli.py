"""The command `cloud-server`: what it accepts, where settings come from, how it fails."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cloud_server import config, server
from cloud_server.cli import main
from cloud_server.config import ServeSettings
from edge_agent.cloud.client import CloudClient
from edge_agent.types import Request
from tests.wire import PATIENCE_S, server_process, until


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that passes for a model until it is loaded."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}", encoding="utf-8")
    return tmp_path / "model"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeSettings]:
    """Settings that a server would have been run with."""
    seen: list[ServeSettings] = []

    async def run(settings: ServeSettings, *_rest: Any) -> signal.Signals:
        seen.append(settings)
        return signal.SIGTERM

    monkeypatch.setattr(server, "run", run)
    return seen


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def write_config(text: str) -> None:
    path = config.config_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(
    model: Path, served: list[ServeSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(f'model = "{model}"\nqueue = 1\ngrace = 1.5\nthreads = 1\n')
    monkeypatch.setenv("CLOUD_SERVER_QUEUE", "2")
    monkeypatch.setenv("CLOUD_SERVER_THREADS", "2")
    result = invoke("serve", "--threads", "3")
    assert result.exit_code == 0, result.output
    (settings,) = served
    assert (settings.threads, settings.queue_limit, settings.grace_s) == (3, 2, 1.5)
    assert (settings.model, str(settings.address)) == (str(model), "127.0.0.1:50051")
    assert (settings.insecure, settings.reflection) == (False, False)


def test_every_setting_of_serve_has_an_environment_twin(
    model: Path, served: list[ServeSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = {
        "MODEL": str(model),
        "ADDRESS": "0.0.0.0:0",
        "INSECURE": "1",
        "REFLECTION": "true",
        "GRACE": "0.5",
        "QUEUE": "0",
        "THREADS": "1",
        "DEVICE": "cuda:1",
    }
    for name, value in twins.items():
        monkeypatch.setenv(f"CLOUD_SERVER_{name}", value)
    assert invoke("serve").exit_code == 0
    (settings,) = served
    assert settings == ServeSettings(
        str(model), config.Address("0.0.0.0", 0), True, True, 0.5, 0, 1, "cuda:1"
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--address", "0.0.0.0:50051"], "0.0.0.0:50051 can be reached from other machines"),
        (["--address", "nonsense"], "'nonsense' is not HOST:PORT"),
        (["--address", "localhost:70000"], "'localhost:70000' has no port"),
        (["--queue", "-1"], "-1"),
        (["--grace", "soon"], "'soon'"),
        (["--threads", "0"], "0"),
        (["--device", "tpu"], "'tpu' is none of auto, cpu, cuda"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_wrong_usage_names_the_value_and_exits_with_2(
    arguments: list[str], told: str, model: Path, served: list[ServeSettings]
) -> None:
    result = invoke("serve", "--model", str(model), *arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert served == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[serve\n", "cannot read"),
        ("colour = 'red'\n", "unknown 'colour'"),
        ("queue = -4\n", "config.toml, queue: -4"),
        ("device = 'tpu'\n", "config.toml, device: 'tpu' is none of"),
    ],
)
def test_a_wrong_config_file_is_named(text: str, told: str, served: list[ServeSettings]) -> None:
    write_config(text)
    result = invoke("serve")
    assert result.exit_code == 2
    assert told in result.stderr
    assert served == []


def test_a_model_that_is_not_there_is_one_sentence() -> None:
    result = invoke("serve", "--model", "./no/such/folder")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: there is no model folder ./no/such/folder")
    assert "Traceback" not in result.stderr


def test_a_port_in_use_is_one_sentence_and_exit_1(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        result = invoke("serve", "--model", str(model), "--address", address)
    assert result.exit_code == 1
    assert f"cannot listen on {address}" in result.stderr


def test_interrupted_exits_with_130(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(*_arguments: Any) -> signal.Signals:
        return signal.SIGINT

    monkeypatch.setattr(server, "run", run)
    assert invoke("serve", "--model", str(model)).exit_code == 130


def test_debug_shows_where_an_error_came_from() -> None:
    result = invoke("serve", "--model", "./nowhere", "--debug")
    assert type(result.exception).__name__ == "ModelError"


def test_help_lists_every_command_and_imports_neither_torch_nor_grpc() -> None:
    for arguments in (["--help"], ["serve", "--help"]):
        code = (
            "import json, sys\nfrom cloud_server.cli import main\n"
            f"main({arguments!r}, standalone_mode=False)\n"
            "print(json.dumps(sorted({'torch', 'diffusers', 'grpc'} & set(sys.modules))))"
        )
        output = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
        assert json.loads(output.splitlines()[-1]) == []
        assert "train-starter" in output or "--reflection" in output


@pytest.mark.slow
def test_serve_draws_with_a_diffusers_folder_until_sigterm(tmp_path: Path) -> None:
    from tests.tiny import make_pipeline

    folder = make_pipeline(tmp_path / "tiny" / "cloud")
    arguments = ("serve", "--model", str(folder), "--address", "127.0.0.1:0", "--threads", "1")
    with server_process(*arguments, module="cloud_server") as running:
        with CloudClient(running.address) as client:
            until(client.healthy, every_s=0.5)  # it loads meanwhile
            first, again = (
                client.generate(Request("a cat on grass"), request_id=name, seed=3)
                for name in ("one", "two")
            )
            (model,) = client.capabilities().models
        assert first.image == again.image
        assert first.model == model.name == "tiny/cloud"
        running.process.terminate()
        assert running.process.wait(PATIENCE_S) == 0


def test_told_to_end_while_the_model_loads_it_does(model: Path) -> None:
    program = """
import sys, threading, time
from cloud_server import cli, engine
def load(*_, **__):
    time.sleep(3600)
engine.DiffusersEngine.load = load
cli.main()
"""
    command = [sys.executable, "-c", program, "serve", "--model", str(model)]
    with subprocess.Popen(
        [*command, "--address", "127.0.0.1:0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline().startswith("listening on")
        process.terminate()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "ended before the model was loaded" in err
