"""The command as a person meets it: its output, its exit codes, what it loads and connects to."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from edge_agent.cli import run
from edge_agent.gallery.png import read_record, write_first
from edge_agent.gallery.preview import PreviewFile
from edge_agent.routing.budget.ledger import Ledger
from edge_agent.runtime import providers
from edge_agent.terminal import output_files
from tests.wire import HeldEngine, free_port, running_server


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Done]
ROOT = Path(__file__).parents[2]
HARD = "two red cats and a dog and the house"
# Any attempt to reach the network ends the process, whoever makes it.
GUARD = """
import os, sys
def guard(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"):
        os.write(2, f"SOCKET: {event} {arguments}".encode())
        os._exit(99)
sys.addaudithook(guard)
"""


@pytest.fixture
def command(
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    """Run the command here, in `tmp_path`, with the tiny bundle: a process each would be slow."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, **extra: str) -> Done:
        env = os.environ | {"EDGE_AGENT_BUNDLE": str(tiny_bundle)} | extra
        code = run(arguments, env)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call


def guarded(program: str, bundle: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"EDGE_AGENT_BUNDLE": str(bundle), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", GUARD + program],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_route_prints_one_json_object_a_line(command: Command) -> None:
    done = command("route", "--json", "--quiet", "a cat", HARD)
    easy, hard = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 0
    assert done.stderr == ""
    assert list(easy) == [
        "prompt", "route", "prs", "score", "threshold", "share", "reason", "metrics",
        "ignored_tokens", "timings_ms",
    ]  # fmt: skip
    assert (easy["route"], hard["route"]) == ("edge", "cloud")
    assert set(hard["metrics"]) == {"Definition", "Sharpness", "Layout"}
    assert set(hard["timings_ms"]) == {"open", "decide"}


def test_route_without_the_cap_fills_the_share(command: Command) -> None:
    routes = [
        command("route", "a cat", "a dog", HARD, "--share", "1", *flags).stdout.split("\n")
        for flags in ((), ("--no-cap",))
    ]
    assert [line[:5].strip() for line in routes[0] if line] == ["edge", "edge", "cloud"]
    assert [line[:5].strip() for line in routes[1] if line] == ["cloud"] * 3


def test_the_end_of_a_prompt_that_is_too_long_is_ignored_aloud(
    command: Command, tmp_path: Path
) -> None:
    long = "a cat and " * 40
    note = "the prompt is longer than the model reads; its last"
    assert note in command("route", long).stderr
    assert note in command("generate", long, "--offline", "-o", "a.png").stderr
    done = command("route", "--json", "--quiet", long)
    assert json.loads(done.stdout)["ignored_tokens"] > 0
    assert done.stderr == ""


def test_a_negative_prompt_that_nobody_hears_is_told(command: Command) -> None:
    given = ("generate", "a cat", "--offline", "--negative-prompt", "a dog", "-o", "a.png")
    note = "the negative prompt was ignored: guidance is 1, it works only above 1"
    assert note in command(*given, "--guidance", "1").stderr
    assert "was ignored" not in command(*given, "--guidance", "2").stderr


def test_route_reads_prompts_from_a_file_and_from_stdin(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = f"a cat\n\n{HARD}\n"
    (tmp_path / "prompts.txt").write_text(prompts)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompts.encode())))
    assert len(command("route", "--file", "-").stdout.splitlines()) == 2
    done = command("route", "--file", "prompts.txt", "--quiet", "the dog")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["edge", "edge", "cloud"]
    assert done.stderr == ""


def test_route_loads_neither_torch_nor_grpc_nor_transformers_nor_pillow(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    program = """
from edge_agent.cli import run
code = run(["route", "a cat"], os.environ)
heavy = {"torch", "grpc", "transformers", "diffusers", "PIL", "huggingface_hub", "tqdm", "protos"}
print(code, sorted(heavy & set(sys.modules)))
"""
    done = guarded(program, tiny_bundle, tmp_path)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


def test_importing_the_package_loads_nothing_heavy(tiny_bundle: Path, tmp_path: Path) -> None:
    program = """
import edge_agent
print(sorted({"numpy", "onnxruntime", "click", "grpc", "PIL"} & set(sys.modules)))
assert edge_agent.__all__ == sorted(edge_agent.__all__)
assert all(getattr(edge_agent, name) for name in edge_agent.__all__)
"""
    done = guarded(program, tiny_bundle, tmp_path)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_offline_private_and_edge_open_no_socket(tiny_bundle: Path, tmp_path: Path) -> None:
    program = f"""
from edge_agent.cli import run
for flags in (["--offline"], ["--private"], ["--route", "edge"]):
    code = run(["generate", {HARD!r}, "--cloud", "127.0.0.1:9", "-o", "a.png", *flags], os.environ)
    print(code, "grpc" in sys.modules)
"""
    done = guarded(program, tiny_bundle, tmp_path)
    assert done.stdout.splitlines() == ["a.png", "0 False"] * 3, done.stderr
    assert read_record(tmp_path / "a.png")["drawn_on"] == "edge"


def test_the_guard_does_see_a_socket(tiny_bundle: Path, tmp_path: Path) -> None:
    program = "import socket; socket.create_connection(('127.0.0.1', 9), 1)"
    assert guarded(program, tiny_bundle, tmp_path).returncode == 99


def test_generate_prints_the_path_and_the_same_seed_gives_identical_files(
    command: Command, tiny_bundle: Path, tmp_path: Path
) -> None:
    first = command("generate", "a red car", "--seed", "7", "-o", "a.png")
    second = subprocess.run(
        [sys.executable, "-m", "edge_agent", "--seed", "7", "-o", "b.png", "a red car"],
        env=os.environ | {"EDGE_AGENT_BUNDLE": str(tiny_bundle), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (first.returncode, first.stdout, second.stdout) == (0, "a.png\n", "b.png\n")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "seed 7" in first.stderr
    record = read_record(tmp_path / "a.png")
    assert (record["prompt"], record["seed"], record["drawn_on"]) == ("a red car", 7, "edge")


def test_a_bare_prompt_draws_into_a_name_that_is_free(command: Command, tmp_path: Path) -> None:
    names = [command("A red car!", "--seed", "7").stdout.strip() for _ in range(2)]
    assert names == ["a-red-car-7.png", "a-red-car-7-2.png"]
    assert all((tmp_path / name).is_file() for name in names)


def test_generate_json_is_the_whole_result(command: Command) -> None:
    done = command("generate", HARD, "--json", "-o", "a.png", "--size", "128x32")
    result = json.loads(done.stdout)
    assert (result["file"], result["width"], result["height"]) == ("a.png", 128, 32)
    assert (result["decision"]["route"], result["drawn_on"]) == ("cloud", "edge")
    assert result["fallback_reason"].startswith("no cloud is configured")
    assert "drawing on the edge instead" in done.stderr


def test_a_cloud_that_nobody_runs_ends_in_a_picture(command: Command, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    done = command(
        "generate", HARD, "--cloud", address, "--deadline", "20", "--json", "-o", "a.png"
    )
    result = json.loads(done.stdout)
    assert (result["drawn_on"], result["fallback_from"]) == ("edge", "cloud")
    assert address in result["fallback_reason"]
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", ""], 2, "prompt '' is empty"),
        (["route", "a cat", " "], 2, "is empty"),
        (["route"], 2, "no prompt to decide on"),
        (["route", "--file", "gone.txt"], 2, "gone.txt cannot be read"),
        (["a" * 100_000], 2, "100000 bytes"),
        (["a\x07cat"], 2, "U+0007"),
        (["a cat", "--size", "130x64"], 2, "width 130 is not a multiple of 8"),
        (["a cat", "--size", "512x64"], 2, "width 512 is over the limit"),
        (["a cat", "--share", "2"], 2, "--share is '2'; choose a number from 0 to 1"),
        (["a cat", "--cloud", "nowhere"], 2, "--cloud is 'nowhere'; choose HOST:PORT"),
        (["a cat", "--budget-pictures", "-1"], 2, "--budget-pictures is '-1'; choose a whole"),
        (["a cat", "--budget-cost", "lots"], 2, "--budget-cost is 'lots'; choose an amount"),
        (["a cat", "--budget-cost", "5"], 2, "price of a picture; give it with --cloud-cost"),
        (["a cat", "--frobnicate"], 2, "--frobnicate"),
        (["a cat", "--deadline", "9e9"], 2, "--deadline is '9e9'; choose a number of seconds"),
        (["--quiet", "--offline", "doctor"], 2, "put doctor before its flags"),
        (["route", "a cat", "a\x07cat"], 2, "prompt 2 of 2: the prompt contains"),
        (["a cat", "-o", f"{'a' * 260}.png"], 1, "File name too long"),
        (["a cat", "-o", "a.jpg"], 2, "a.jpg does not end in .png"),
        (["a cat", "-o", "gone/a.png"], 1, "folder gone does not exist"),
        (["a cat", "--bundle", "gone"], 1, "no bundle at gone"),
        (["a cat", "--route", "cloud"], 2, "no cloud is configured"),
    ],
)
def test_bad_input_is_one_sentence_with_its_value(
    command: Command, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.png"))


def test_debug_adds_the_traceback(command: Command) -> None:
    assert "Traceback" in command("a cat", "--bundle", "gone", "--debug").stderr
    done = command("a cat", "--bundle", "gone", EDGE_AGENT_DEBUG="1")
    assert "Traceback" in done.stderr


def test_a_reader_that_leaves_early_causes_no_traceback(tiny_bundle: Path, tmp_path: Path) -> None:
    program = f"""
sys.stdout.close()
reading, writing = os.pipe()
os.close(reading)
os.dup2(writing, 1)
sys.stdout = open(1, "w", closefd=False)
from edge_agent.cli import run
code = run(["route", "--quiet"] + [{HARD!r}] * 200, os.environ)
sys.stdout = None
os._exit(code)
"""
    done = guarded(program, tiny_bundle, tmp_path)
    assert (done.returncode, done.stderr) == (1, "")


def test_ctrl_c_stops_inside_a_step_and_leaves_no_file(
    tiny_bundle: Path, tmp_path: Path, slow_unet: Callable[[Path], None]
) -> None:
    slow_unet(tiny_bundle)
    folder = tmp_path / "out"
    folder.mkdir()
    # A step of this network lasts for hours, so only a stop inside a step ends the process.
    program = """
import signal, threading, time
def interrupt():
    while not any(thread.name == "drawing" for thread in threading.enumerate()):
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
from edge_agent.cli import run
sys.exit(run(["a cat", "-o", "a.png"], os.environ))
"""
    done = guarded(program, tiny_bundle, folder)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "edge-agent: stopped; nothing was written\n"
    assert os.listdir(folder) == []


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_in_the_middle_takes_the_preview_away_too(
    tiny_bundle: Path, tmp_path: Path, slow_unet: Callable[..., None], kind: signal.Signals
) -> None:
    """As a terminal does it: a signal from outside, once the first of several steps is seen."""
    slow_unet(tiny_bundle, below=900)  # the first step is at 999, the next takes hours
    folder = tmp_path / "out"
    folder.mkdir()
    env = os.environ | {"EDGE_AGENT_BUNDLE": str(tiny_bundle), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "edge_agent", "a cat", "-o", "a.png", "--preview", "1"]
    with subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while "a.preview.png" not in os.listdir(folder):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(kind)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines() == [
        "edge-agent: see a.preview.png while it is drawn",
        "edge-agent: stopped; nothing was written",
    ]
    assert os.listdir(folder) == []


def test_a_preview_is_beside_the_picture_while_it_is_drawn(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.preview.png").write_bytes(b"somebody's own")
    seen: list[list[str]] = []
    show = PreviewFile.show

    def watched(file: PreviewFile, image: Image.Image) -> str | None:
        told = show(file, image)
        seen.append(sorted(os.listdir(tmp_path)))
        return told

    monkeypatch.setattr(PreviewFile, "show", watched)
    done = command("a cat", "-o", "a.png", "--preview", "1", "--offline")
    assert (done.returncode, done.stdout) == (0, "a.png\n")
    assert done.stderr.count("see a-2.preview.png while it is drawn") == 1
    assert seen == [["a-2.preview.png", "a.preview.png", "bundle"]] * 3
    assert sorted(os.listdir(tmp_path)) == ["a.png", "a.preview.png", "bundle"]
    assert (tmp_path / "a.preview.png").read_bytes() == b"somebody's own"


def test_a_bundle_without_a_small_decoder_says_so_and_draws(
    command: Command, tiny_bundle: Path, rewrite: Callable[..., None]
) -> None:
    rewrite(tiny_bundle, lambda content: content["diffusion"].pop("preview"))
    done = command("a cat", "-o", "a.png", "--preview", "1", "--offline")
    assert done.returncode == 0
    assert "no preview: the bundle has no small decoder" in done.stderr


def test_doctor_reports_bundle_networks_and_where_settings_come_from(
    command: Command,
) -> None:
    done = command("doctor", "--json", "--share", "0.5", EDGE_AGENT_OFFLINE="yes")
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["bundle"]["ok"]
    assert {part["name"] for part in report["bundle"]["components"]} == {
        "text_encoder", "predictor", "unet", "vae_decoder",
    }  # fmt: skip
    for part in report["bundle"]["components"]:
        assert (part["provider"], part["reason"]) == ("cpu", "not measured here yet")
        assert part["runs_on"].startswith("cpu (onnxruntime ")
        assert part["measured"] == {}
    assert report["runtime"]["conflict"] is None
    settings = report["settings"]
    assert settings["share"] == {"value": 0.5, "source": "--share"}
    assert settings["offline"] == {"value": True, "source": "EDGE_AGENT_OFFLINE"}
    assert settings["steps"] == {"value": 4, "source": "the bundle"}
    assert settings["bundle"]["source"] == "EDGE_AGENT_BUNDLE"
    assert report["cloud"]["status"] == "not asked: offline"
    assert report["budget"]["status"].startswith("nothing spent yet, no ledger at ")


def test_doctor_measures_when_asked_to(command: Command) -> None:
    done = command("doctor", "--offline", "--measure", "--threads", "1")
    assert done.returncode == 0
    assert "edge-agent: unet on cpu: " in done.stderr
    lines = done.stdout.splitlines()
    unet = next(i for i, line in enumerate(lines) if line.startswith("  unet "))
    assert "measured here: " in lines[unet + 1]
    assert lines[unet + 2].split()[0] == "cpu"
    assert "200 dB from the CPU" in lines[unet + 2]


def test_a_provider_that_is_not_here_is_wrong_usage(command: Command) -> None:
    absent = next(name for name in ("coreml", "cuda") if name not in providers.available())
    done = command("generate", "a cat", "--provider", absent)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"provider {absent} is not installed here (cpu" in done.stderr
    assert command("doctor", "--offline", "--provider", absent).returncode == 1


def test_every_memory_mode_says_how_much_it_took(command: Command) -> None:
    drawn = []
    for mode in ("low", "normal", "high"):
        file = f"{mode}.png"
        options = ("--seed", "1", "--memory", mode, "-o", file, "--json", "--offline")
        told = json.loads(command("generate", "a cat", *options).stdout)
        assert told["peak_rss_bytes"] > 1e7
        assert told["backends"]["unet"].startswith("cpu (onnxruntime ")
        assert set(told["backends"]) == {"text_encoder", "predictor", "unet", "vae_decoder"}
        drawn.append(Path(file).read_bytes())
    assert drawn[1] == drawn[2]


def test_doctor_of_a_broken_bundle_says_what_is_wrong_and_fails(
    command: Command, tiny_bundle: Path
) -> None:
    (tiny_bundle / "predictor" / "model.onnx").unlink()
    done = command("doctor", "--cloud", "127.0.0.1:9")
    assert done.returncode == 1
    assert "lacks" in done.stdout
    assert "127.0.0.1:9" in done.stdout


def test_a_budget_holds_over_separate_commands(command: Command, tmp_path: Path) -> None:
    budget = ["--budget-cost", "0.10", "--cloud-cost", "0.05", "--ledger", "l", "--share", "1"]
    with running_server(HeldEngine(held=False)) as server:
        ask = ["generate", HARD, "--json", "--quiet", "-o", "a.png", "--cloud", server.address]
        results = [json.loads(command(*ask, *budget).stdout) for _ in range(3)]
    assert [result["drawn_on"] for result in results] == ["cloud", "cloud", "edge"]
    assert results[2]["fallback_reason"].startswith(
        "the budget of 0.10 a day has no room for a cloud picture at 0.05: 0.1 is spent on "
    )
    assert Ledger(tmp_path / "l").spent().pictures == 2
    doctor = command("doctor", "--offline", "--json", *budget)
    spent = json.loads(doctor.stdout)["budget"]
    assert (spent["pictures"], spent["cost"], spent["unsure"]) == (2, "0.1", 0)
    assert spent["status"].endswith("limit a day: 0.10 cost")


def test_a_cloud_that_nobody_runs_costs_nothing(command: Command, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    budget = ["--budget-pictures", "1", "--ledger", "l", "--cloud", address]
    assert command("generate", HARD, "-o", "a.png", *budget).returncode == 0
    assert Ledger(tmp_path / "l").spent().pictures == 0


def test_without_a_budget_there_is_no_ledger_and_with_one_none_for_the_device(
    command: Command, tmp_path: Path
) -> None:
    plain = [
        "generate",
        HARD,
        "--seed",
        "7",
        "--cloud",
        f"127.0.0.1:{free_port()}",
        "--ledger",
        "l",
    ]
    command(*plain, "--offline", "-o", "a.png")
    command(*plain, "-o", "b.png")
    for flags in (["--offline"], ["--private"], ["--route", "edge"]):
        command(*plain, "--pace", "--budget-pictures", "1", *flags, "-o", "c.png")
    assert read_record(tmp_path / "c.png")["drawn_on"] == "edge"
    assert not (tmp_path / "l").exists()


def test_a_ledger_that_is_none_is_said_and_stays_as_it_is_while_the_device_draws(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "l").write_text("my diary")
    budget = ["--cloud", "127.0.0.1:9", "--pace", "--share", "1", "--ledger", "l"]
    done = command("generate", HARD, "-o", "a.png", *budget)
    assert done.returncode == 0
    assert "the budget's ledger l cannot be read (file is not a" in done.stderr
    assert read_record(tmp_path / "a.png")["drawn_on"] == "edge"
    assert (tmp_path / "l").read_text() == "my diary"


def test_the_ledger_is_kept_in_the_user_s_state_folder(command: Command) -> None:
    command("generate", HARD, "--cloud", f"127.0.0.1:{free_port()}", "--pace", "-o", "a.png")
    assert (Path(os.environ["XDG_STATE_HOME"]) / "routet2i-edge" / "budget.sqlite3").is_file()


@pytest.mark.parametrize(("typed", "meant"), [("docter", "doctor"), ("reconize", "recognize")])
def test_a_misspelt_command_draws_no_picture_of_that_word(
    command: Command, tmp_path: Path, typed: str, meant: str
) -> None:
    done = command(typed, "--offline")
    assert done.returncode == 2
    assert f"'{typed}' is no command; did you mean '{meant}'?" in done.stderr
    assert not list(tmp_path.glob("*.png"))
    assert command("generate", typed, "--offline").returncode == 0


def test_a_prompt_is_not_taken_for_a_misspelt_command(command: Command) -> None:
    for prompt in ("a doctor", "root", "degenerate cats", "docks"):
        assert command(prompt, "--offline", "-o", "drawn.png").returncode == 0


def test_flags_may_stand_before_a_prompt(command: Command, tmp_path: Path) -> None:
    assert command("--offline", "--seed", "7", "a", "doctor", "-o", "a.png").returncode == 0
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&- <&-"])
def test_closed_streams_cost_no_picture(tiny_bundle: Path, tmp_path: Path, closed: str) -> None:
    env = os.environ | {"EDGE_AGENT_BUNDLE": str(tiny_bundle), "PYTHONPATH": str(ROOT)}
    line = f'"{sys.executable}" -m edge_agent "a cat" --offline -o a.png {closed}'
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, env=env, timeout=60, check=False)
    assert done.returncode == 0
    assert (tmp_path / "a.png").is_file()


def test_what_the_output_cannot_hold_is_said(tiny_bundle: Path, tmp_path: Path) -> None:
    env = os.environ | {"EDGE_AGENT_BUNDLE": str(tiny_bundle), "PYTHONPATH": str(ROOT)}
    route = [sys.executable, "-m", "edge_agent", "route", "--quiet"]
    latin = env | {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    done = subprocess.run([*route, "--json", "猫 🐈"], env=latin, capture_output=True, check=True)
    assert json.loads(done.stdout.decode("ascii"))["prompt"] == "猫 🐈"
    plain = subprocess.run([*route, "猫"], env=latin, capture_output=True, check=True)
    assert plain.stdout.decode("ascii").endswith("\\u732b\n")
    with open("/dev/full", "wb") as full:
        none = subprocess.run(
            [*route, "a cat"], env=env, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert none.returncode == 1
    assert none.stderr.startswith("edge-agent: the answer could not be printed")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
def test_libraries_that_find_no_memory_are_a_sentence(tiny_bundle: Path, tmp_path: Path) -> None:
    program = """
import resource
from edge_agent.cli import run
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (8 << 20),) * 2)
sys.exit(run(["route", "a cat"], os.environ))
"""
    done = guarded(program, tiny_bundle, tmp_path)
    told = "edge-agent: the command ran out of memory; ask for --memory low or a smaller --size"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{told}, or close other programs\n"


def test_a_file_has_one_prompt_a_line_whatever_is_in_it(command: Command, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("a cat\u2028on a beach\r\n\n a dog \n".encode())
    done = command("route", "--json", "--file", "prompts.txt")
    prompts = [json.loads(line)["prompt"] for line in done.stdout.splitlines()]
    assert prompts == ["a cat\u2028on a beach", " a dog "]
    shown = command("route", "--quiet", "a cat\nedge   0.100  forged")
    assert len(shown.stdout.splitlines()) == 1


def test_two_pictures_of_one_name_at_once_take_two(tiny_bundle: Path, tmp_path: Path) -> None:
    """Both have looked for a name before either has written."""
    names = [output_files(tmp_path, "a cat", 7) for _ in range(8)]
    image = Image.new("RGB", (8, 8))
    with ThreadPoolExecutor(8) as threads:
        written = list(threads.map(lambda files: write_first(files, image, {}), names))
    wanted = {"a-cat-7.png", *(f"a-cat-7-{copy}.png" for copy in range(2, 9))}
    assert {file.name for file in written} == wanted
    assert {file.name for file in tmp_path.glob("*.png")} == wanted
    assert not list(tmp_path.glob(".*"))


def test_doctor_tells_a_limit_that_generate_would_refuse(command: Command) -> None:
    done = command("doctor", "--offline", "--budget-cost", "2")
    assert "without the price of a picture" in done.stdout


def test_a_cascade_draws_here_first_and_tells_what_it_saw(
    command: Command, tiny_bundle: Path, hire_critic: Callable[[Path, float], None]
) -> None:
    hire_critic(tiny_bundle, 0.1)
    cloud = f"127.0.0.1:{free_port()}"
    done = command("generate", HARD, "--cascade", "--cloud", cloud, "--json", "--seed", "3")
    result = json.loads(done.stdout)
    assert set(result["decision"]["quality"]) == set(result["decision"]["metrics"])
    assert result["decision"]["score"] == pytest.approx(0.9)
    assert (result["drawn_on"], result["fallback_from"]) == ("edge", "cloud")
    assert "keeping the picture of the edge instead: the cloud at" in done.stderr
    assert read_record(Path(result["file"]))["decision"]["quality"]
    with running_server(HeldEngine(held=False)) as server:
        done = command("generate", HARD, "--cascade", "--cloud", server.address, "--json")
    assert json.loads(done.stdout)["drawn_on"] == "cloud"


def test_a_cascade_needs_a_critic(command: Command) -> None:
    cloud = f"127.0.0.1:{free_port()}"
    done = command("generate", HARD, "--cloud", cloud, EDGE_AGENT_CASCADE="yes")
    assert done.returncode == 2
    assert "has no critic to look at pictures with; export it with" in done.stderr
    assert command("generate", HARD, EDGE_AGENT_CASCADE="yes").returncode == 0  # no cloud to ask
    done = command("route", HARD, "--quiet", EDGE_AGENT_CASCADE="yes", EDGE_AGENT_CLOUD=cloud)
    assert done.returncode == 0
    done = command("doctor", EDGE_AGENT_CASCADE="yes")
    assert done.returncode == 1
    assert "has no critic to look at pictures with" in done.stdout


def test_doctor_opens_and_measures_the_critic_too(
    command: Command, tiny_bundle: Path, hire_critic: Callable[[Path, float], None]
) -> None:
    hire_critic(tiny_bundle, 0.1)
    done = command("doctor", "--measure", "--json", EDGE_AGENT_CASCADE="yes")
    (critic,) = (
        p for p in json.loads(done.stdout)["bundle"]["components"] if p["name"] == "critic"
    )
    assert critic["runs_on"]
    assert critic["measured"]["cpu"]["psnr_db"] > 60
    hire_critic(tiny_bundle, float("nan"))
    assert command("doctor").returncode == 0  # which nobody looks with
    done = command("doctor", EDGE_AGENT_CASCADE="yes")
    assert done.returncode == 1
    assert "the critic answered" in done.stdout


def test_route_says_what_the_prompt_alone_says_of_a_cascade(
    command: Command, tiny_bundle: Path, hire_critic: Callable[[Path, float], None]
) -> None:
    hire_critic(tiny_bundle, 0.9)
    done = command("route", HARD, EDGE_AGENT_CASCADE="yes")
    assert done.stdout.startswith("cloud")
    assert "that is what the prompt alone says; a cascade decides when it has drawn" in done.stderr
