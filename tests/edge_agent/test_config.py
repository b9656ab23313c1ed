"""Flag, then environment, then config.toml, then default; and what each error says."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.config import OPTIONS, resolve
from edge_agent.errors import ConfigError
from edge_agent.types import Memory, Provider, Route


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(config: Path) -> None:
    config.write_text('share = 0.1\nsteps = 5\nroute = "edge"\n')
    env = {"EDGE_AGENT_SHARE": "0.2", "EDGE_AGENT_STEPS": "6"}
    settings = resolve({"share": "0.3"}, env, config)
    assert (settings.share, settings.steps, settings.route) == (0.3, 6, Route.EDGE)
    assert settings.guidance is None
    assert settings.sources["share"] == "--share"
    assert settings.sources["steps"] == "EDGE_AGENT_STEPS"
    assert settings.sources["route"] == f"route in {config}"
    assert settings.sources["guidance"] == "default"


def test_every_option_has_a_setting_and_an_environment_twin(config: Path) -> None:
    good = {
        "bundle": "b", "share": "0.5", "cap": "no", "cascade": "yes", "offline": "true",
        "cloud": "127.0.0.1:50051", "pace": "on",
        "budget_pictures": "5", "budget_cost": "1.50", "cloud_cost": "0.05",
        "ledger": "l.sqlite3",
        "route": "cloud", "deadline": "3", "private": "1", "seed": "9", "size": "64x32",
        "steps": "3", "guidance": "2.5", "sampler": "euler-a", "preview": "2",
        "negative_prompt": "rain", "output": "a.png", "client": "anna", "history": "30",
        "histories": "h", "top": "3",
        "provider": "openvino:f32", "memory": "low",
        "threads": "2", "json": "yes", "quiet": "on", "debug": "TRUE",
    }  # fmt: skip
    assert set(good) == set(OPTIONS)
    env = {f"EDGE_AGENT_{name.upper()}": value for name, value in good.items()}
    settings = resolve({}, env, config)
    assert set(settings.sources.values()) == set(env)
    assert settings.size == (64, 32)
    assert (settings.provider, settings.memory) == (Provider.OPENVINO_F32, Memory.LOW)
    assert settings.request("a cat").deadline_s == 3.0
    assert settings.request("a cat").preview_every == 2
    assert settings.debug


def test_a_switch_can_be_turned_off_again_by_its_flag(config: Path) -> None:
    config.write_text("offline = true")
    assert resolve({}, {}, config).offline
    assert not resolve({"offline": False}, {}, config).offline


def test_an_empty_variable_is_no_value(config: Path) -> None:
    assert resolve({}, {"EDGE_AGENT_CLOUD": ""}, config).cloud is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("share", "1.5"),
        ("share", "nan"),
        ("share", "lots"),
        ("route", "moon"),
        ("deadline", "0"),
        ("deadline", "inf"),
        ("seed", "-1"),
        ("seed", "1.5"),
        ("size", "128"),
        ("size", "0x8"),
        ("size", "-8x8"),
        ("steps", "0"),
        ("steps", "201"),
        ("guidance", "-1"),
        ("guidance", "inf"),
        ("sampler", "plms"),
        ("threads", "0"),
        ("offline", "maybe"),
        ("pace", "often"),
        ("budget_pictures", "-1"),
        ("budget_pictures", "2.5"),
        ("budget_cost", "-0.01"),
        ("budget_cost", "nan"),
        ("budget_cost", "1e9"),
        ("budget_cost", "five"),
        ("cloud_cost", "0.0000001"),
        ("cloud", "nowhere"),
        ("cloud", "http://host:1"),
        ("cloud", "host:99999"),
    ],
)
def test_a_bad_value_is_named_with_where_it_stands_and_what_to_choose(
    config: Path, name: str, value: str
) -> None:
    variable = f"EDGE_AGENT_{name.upper()}"
    with pytest.raises(ConfigError, match=f"{variable} is '{value}'; choose "):
        resolve({}, {variable: value}, config)
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is '{value}'"):
        resolve({name: value}, {}, config)


def test_a_bad_value_in_the_file_is_named_with_the_file(config: Path) -> None:
    config.write_text("steps = [1, 2]")
    with pytest.raises(ConfigError, match=r"steps in .*config\.toml is '\[1, 2\]'"):
        resolve({}, {}, config)


def test_an_unknown_key_is_named_with_the_nearest(config: Path) -> None:
    config.write_text("of_line = true")
    with pytest.raises(ConfigError, match="'of_line', which is no setting; did you mean 'offline'"):
        resolve({}, {}, config)


@pytest.mark.parametrize("content", [b"share = ", b"\xff"])
def test_a_file_that_is_not_toml_is_named(config: Path, content: bytes) -> None:
    config.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.toml is not valid TOML"):
        resolve({}, {}, config)


def test_a_tilde_is_the_home_wherever_a_path_stands(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config.write_text('ledger = "~/spent.sqlite3"')
    found = resolve({"histories": "~/seen"}, {"EDGE_AGENT_BUNDLE": "~/bundle"}, config)
    wanted = tuple(tmp_path / name for name in ("bundle", "spent.sqlite3", "seen"))
    assert (found.bundle, found.ledger, found.histories) == wanted


def test_places_in_the_file_are_the_same_wherever_the_command_is_called_from(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text('\ufeffledger = "spent.sqlite3"\noutput = "pictures"', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    found = resolve({"histories": "seen"}, {}, config)
    assert found.ledger == config.parent / "spent.sqlite3"
    assert (found.histories, found.output) == (Path("seen"), Path("pictures"))
