"""Checkpoints on a hub, which a small HTTP server on loopback plays: revisions, formats, faults."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from blipstream_export.checkpoint import load_model, open_checkpoint

from blipstream.errors import BlipstreamError, CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1.0", "refs/pr/3", COMMIT)


class Hub:
    """Serves the files of repositories, and remembers which were asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.sent: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(hub) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.partition("?")[0].replace("%2F", "/")
                about = re.fullmatch(r"/api/models/(\w+/[\w.-]+)/(?:revision|tree)/(.+)", path)
                file = re.fullmatch(rf"/(\w+/[\w.-]+)/resolve/{COMMIT}/(.+)", path)
                files = hub.repositories.get((about or file or [""] * 2)[1], {})
                if about and files and "/tree/" in path:
                    entries = [{"type": "file", "path": name, "size": len(x), "oid": name} for name, x in files.items()]
                    self._send(json.dumps(entries).encode())
                elif about and files and about[2] in REVISIONS:
                    siblings = [{"rfilename": name} for name in files]
                    self._send(json.dumps({"id": about[1], "sha": COMMIT, "siblings": siblings}).encode())
                elif file and file[2] in files:
                    hub.sent.append(file[2])
                    self._send(files[file[2]])
                else:
                    code = "RevisionNotFound" if about and files else "RepoNotFound"
                    self._send(b"{}", 404, {"X-Error-Code": code})

            def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                etag = hashlib.sha256(body).hexdigest()
                fields = {"Content-Length": str(len(body)), "ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
                for name, value in {**fields, **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_args: object) -> None:
                pass

        return Handler


@pytest.fixture
def hub(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub()
    files = {path.name: path.read_bytes() for path in random_checkpoint.iterdir()}
    small = {name: data for name, data in files.items() if name != "model.safetensors"}
    llava = json.dumps({"model_type": "llava", "architectures": ["Llava"]}).encode()
    hub.repositories = {
        "owner/tiny": files,
        "owner/pickled": {**small, "pytorch_model.bin": b"PK"},
        "owner/llava": {**files, "config.json": llava},
    }
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield hub
    hub.close()


@pytest.mark.parametrize(
    ("source", "revision"),
    [("owner/tiny", None), ("owner/tiny@v1.0", None), ("owner/tiny", "refs/pr/3"), (f"owner/tiny@{COMMIT}", None)],
)
def test_a_revision_is_downloaded_and_its_commit_recorded(hub: Hub, source: str, revision: str | None) -> None:
    checkpoint = open_checkpoint(source, revision=revision)
    assert (checkpoint.name, checkpoint.commit) == ("owner/tiny", COMMIT)
    load_model(checkpoint, deferred=True)
    assert "model.safetensors" in hub.sent
    cached = open_checkpoint(str(checkpoint.folder))
    assert (cached.name, cached.commit) == ("owner/tiny", COMMIT)


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        (
            "owner/pickled",
            None,
            "checkpoint owner/pickled holds its weights as pytorch_model.bin, and Blipstream reads",
        ),
        ("owner/llava", None, "of a kind that Blipstream does not serve"),
        (
            "owner/tiny@v9",
            None,
            "folder owner/tiny@v9, and the hub did not give a checkpoint of that id: it has no such revision",
        ),
        (
            "owner/nothing",
            None,
            "and the hub did not give a checkpoint of that id: there is no such repository, or it is private",
        ),
        ("owner/tiny@main", "v1.0", "owner/tiny@main names a revision, and v1.0 was given as another one"),
    ],
)
def test_faults_cost_no_download_of_weights(hub: Hub, source: str, revision: str | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(source, revision=revision)
    assert "\n" not in str(raised.value)
    assert not {"model.safetensors", "pytorch_model.bin"} & set(hub.sent)


def test_what_is_cached_opens_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    open_checkpoint("owner/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert open_checkpoint("owner/tiny").commit == COMMIT
    with pytest.raises(BlipstreamError, match="there is no folder owner/llava, and the hub did not give"):
        open_checkpoint("owner/llava")
