"""The wire: generated code is current, addresses are read alike on both ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from protos import generate
from protos.address import parse_address


def test_generated_code_is_current() -> None:
    pytest.importorskip("grpc_tools")
    assert generate.stale() == [], "run `python -m protos.generate`"


def test_check_names_a_stale_file_and_fails(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("grpc_tools")
    monkeypatch.setattr(generate, "stale", lambda: [generate.SOURCE])
    monkeypatch.setattr(sys, "argv", ["generate", "--check"])
    assert generate.main() == 1
    assert "image_generation.proto is stale" in capsys.readouterr().err


def test_reading_an_address_needs_no_grpc() -> None:
    code = "import sys, protos.address; assert 'grpc' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [
        ("127.0.0.1:50051", "127.0.0.1", 50051, True),
        ("localhost:1", "localhost", 1, True),
        ("[::1]:65535", "::1", 65535, True),
        ("10.0.0.7:80", "10.0.0.7", 80, False),
        ("gpu-1.example.org:443", "gpu-1.example.org", 443, False),
    ],
)
def test_an_address_is_read_and_written_alike(
    text: str, host: str, port: int, loopback: bool
) -> None:
    address = parse_address(text)
    assert (address.host, address.port, address.loopback) == (host, port, loopback)
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        ":50051",
        "localhost:",
        "localhost:0",
        "localhost:65536",
        "localhost:99999999999999999999",
        "localhost:٣",
        "localhost:-1",
        "http://localhost:50051",
        "::1:50051",
        "[::1:50051",
        "[nonsense]:50051",
        "two words:50051",
        "a..b:50051",
        "-a:50051",
        "host\n:50051",
    ],
)
def test_a_malformed_address_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="address") as caught:
        parse_address(text)
    assert repr(text) in str(caught.value)
