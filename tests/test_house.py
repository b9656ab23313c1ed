"""The rules of the house: who imports whom, what is public, what README promises."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("edge_agent", "cloud_server", "export", "protos")
CLOUD_ONLY = {
    "accelerate", "cloud_server", "demo", "diffusers", "export", "jinja2", "matplotlib", "onnx",
    "open_clip", "optimum", "safetensors", "sklearn", "textblob", "timm", "torch", "torchvision",
    "transformers",
}  # fmt: skip
README = (ROOT / "README.md").read_text(encoding="utf-8")


def modules(*folders: str) -> list[Path]:
    """Every module of ours below these folders of the clone, generated code left out."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return [path for path in found if "_pb2" not in path.name]


@cache
def imported(path: Path) -> frozenset[str]:
    """The absolute name of everything that a module imports, wherever in it."""
    return frozenset(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(package: str, *folders: str) -> set[str]:
    """The modules below `folders` that import `package`, as paths in the clone."""
    return {
        str(path.relative_to(ROOT))
        for path in modules(*folders)
        if any(name == package or name.startswith(package + ".") for name in imported(path))
    }


def is_in(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)


@pytest.mark.parametrize("package", sorted(CLOUD_ONLY))
def test_the_device_imports_nothing_of_the_cloud(package: str) -> None:
    assert importers(package, "edge_agent") == set()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_only_the_runtime_sees_an_engine_on_the_device(engine: str) -> None:
    users = importers(engine, "edge_agent")
    assert users
    assert all(is_in(user, "edge_agent/runtime") for user in users)


@pytest.mark.parametrize("package", ["grpc", "grpc_health", "protos.t2i"])
def test_only_the_cloud_client_sees_grpc_on_the_device(package: str) -> None:
    users = importers(package, "edge_agent")
    assert users
    assert all(is_in(user, "edge_agent/cloud") for user in users)


@pytest.mark.parametrize("module", ["types", "errors"])
def test_types_and_errors_import_nothing_of_ours(module: str) -> None:
    names = {name.partition(".")[0] for name in imported(ROOT / f"edge_agent/{module}.py")}
    assert names.isdisjoint(PACKAGES)


def test_the_cloud_server_imports_of_the_device_only_what_both_must_do_alike() -> None:
    assert importers("export", "cloud_server") == set()
    users = importers("edge_agent", "cloud_server")
    assert all(is_in(user, "cloud_server/training") for user in users)
    names = {name for user in users for name in imported(ROOT / user) if "edge_agent" in name}
    shared = ("edge_agent.routing.", "edge_agent.recognition.pictures.", "edge_agent.errors.")
    assert all(name.startswith(shared) for name in names)


def test_the_wire_depends_on_nobody() -> None:
    for package in ("edge_agent", "cloud_server", "export"):
        assert importers(package, "protos") == set()


@pytest.mark.parametrize("package", ["diffusers", "transformers", "open_clip", "optimum", "timm"])
def test_whoever_imports_a_torch_library_calls_the_guard(package: str) -> None:
    for user in importers(package, "cloud_server", "export", "demo", "benchmarks"):
        assert "guard()" in (ROOT / user).read_text(encoding="utf-8"), user


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_that_it_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        path
        for path in modules(*PACKAGES, "demo", "benchmarks", "models")
        if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert silent == []


def test_the_base_install_asks_for_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[^\w-]", wanted)[0].lower() for wanted in project["dependencies"]}
    assert names.isdisjoint({"torch", "torchvision", "diffusers", "transformers", "onnx"})


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("==")[0] for line in lines if not line.startswith("#")]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *chain.from_iterable(extras)]
    names = {re.split(r"[^\w-]", line)[0] for line in wanted} - {project["name"]}
    assert {name.lower().replace("_", "-") for name in names} <= {
        pin.lower().replace("_", "-") for pin in pins
    }


def readme_commands(program: str) -> list[list[str]]:
    """What follows `program` on README's command lines that call it, in code blocks only."""
    blocks = re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = [line.partition("#")[0].split() for block in blocks for line in block.splitlines()]
    called = program.split()
    return [words[len(called) :] for words in lines if words[: len(called)] == called]


@pytest.mark.parametrize("program", ["edge-agent", "cloud-server", "python -m export"])
def test_commands_and_flags_in_readme_exist(program: str) -> None:
    module = importlib.import_module(program.split()[-1].replace("-", "_") + ".cli")
    group = module.cli if program == "edge-agent" else module.main
    used = readme_commands(program)
    assert used
    for words in used:
        command = group
        if isinstance(group, click.Group):
            command = group.get_command(click.Context(group), words[0])
        assert command is not None, words
        known = {flag for option in command.params for flag in option.opts + option.secondary_opts}
        assert {word for word in words if word.startswith("-")} <= known, words


def test_make_targets_in_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake ([a-z-]+)\b", README)) - {"nothing"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_readme_lists_every_setting_with_its_flag_and_variable() -> None:
    from edge_agent.config import ENV_PREFIX, OPTIONS

    rows = {row.split("`")[1]: row for row in README.splitlines() if ENV_PREFIX in row}
    rows = {name: row for name, row in rows.items() if name in OPTIONS}
    assert list(rows) == list(OPTIONS)
    for name, row in rows.items():
        assert f"--{name.replace('_', '-')}" in row
        assert f"`{ENV_PREFIX}{name.upper()}`" in row


def test_readme_shows_the_ten_metrics_as_they_are() -> None:
    file = ROOT / "cloud_server/training/quality/metrics.toml"
    for metric in tomllib.loads(file.read_text(encoding="utf-8"))["metric"]:
        assert f"| {metric['name']} | {metric['positive']} | {metric['negative']} |" in README


@pytest.mark.parametrize("page", ["README.md", "docs/measurements.md"])
def test_pages_link_to_what_is_there(page: str) -> None:
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        file, _, heading = target.partition("#")
        there = folder / file if file else ROOT / page
        assert there.is_file(), target
        titles = re.findall(r"^#+ (.+)$", there.read_text("utf-8"), re.MULTILINE) if heading else []
        assert heading in {"", *(title.lower().replace(" ", "-") for title in titles)}, target
