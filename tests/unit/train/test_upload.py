"""Uploads to a hub that cannot be reached, or that refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
from in_process import refuse

from engine.config.reading import parse_config
from engine.config.tools import ExportConfig
from engine.errors import UserError
from engine.train.upload import REFUSALS, describe_upload, require_token, upload


class Refusing(BaseHTTPRequestHandler):
    status = 0

    def do_POST(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    """A hub that answers each POST with Refusing.status."""
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("status", sorted(REFUSALS))
def test_a_refusal_names_the_remedy_and_the_folder(status: int, hub: HTTPServer, tmp_path: Path) -> None:
    Refusing.status = status
    with pytest.raises(UserError) as refusal:
        upload(tmp_path, "ada/small")
    assert str(refusal.value) == f"push_to_hub='ada/small': {REFUSALS[status]}. The folder is complete: {tmp_path}"


def test_no_network_is_one_line(hub: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 cannot be used \(.*refused\); try again when it can"):
        upload(tmp_path, "ada/small")


def test_no_token_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="push_to_hub='ada/small': no token; log in with `hf auth login`"):
        require_token("ada/small")


def test_a_dry_run_names_repository_and_files(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"12345")
    assert describe_upload(tmp_path, "ada/small").splitlines() == [
        f"nothing is uploaded; to ada/small, private where it is new, would go {tmp_path}:",
        "  onnx/model.onnx  5 bytes",
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--push_to_hub", "small"], "push_to_hub='small': must be OWNER/NAME"),
        (["--push_to_hub", "a/b/c"], "push_to_hub='a/b/c': must be OWNER/NAME"),
        (["--dry_run", "true"], "dry_run=True: has no effect without push_to_hub; remove it"),
    ],
)
def test_mistakes_are_one_line(words: list[str], says: str) -> None:
    assert says in refuse("export", "--run", "nowhere", *words)


def test_settings_of_an_upload() -> None:
    config = parse_config(ExportConfig, ["--run", "r", "--push_to_hub", "a/b", "--dry_run", "true"], "")
    assert (config.push_to_hub, config.dry_run, config.format) == ("a/b", True, "transformers")
