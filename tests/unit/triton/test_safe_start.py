"""What a server is started with: a bundle that is checked, and paths that no shell can misread. None is started."""

from __future__ import annotations

import errno
import io
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from blipstream.bundle import check_bundle, sha256
from blipstream.cli import app
from blipstream.commands.serve import _say, _StopSignals
from blipstream.config import ServerConfig
from blipstream.errors import BlipstreamError, BundleError, ServerStartError
from blipstream.manifest import FileEntry, Manifest
from blipstream.paths import utf8_path
from blipstream.repository import write_models
from blipstream.triton import folder as folder_module
from blipstream.triton import machine
from blipstream.triton import server as server_module
from blipstream.triton.folder import ServerFolder, is_safe
from blipstream.triton.installation import Installation
from blipstream.triton.log import LogPump
from blipstream.triton.machine import LEAST_SHARED_BYTES, check_machine, has_dead_model, shared_memory_warning
from blipstream.triton.server import TritonServer
from tests.unit.triton.fakes import make_manifest

HOSTILE = "-a b'\"$(touch PWNED)`touch PWNED`;touch PWNED;&*?[x]{a,b}~!#%=,:\\ \n\u00fc\u65e5\udcff"
"""A file name with all that shells, lists of paths and encodings trip over."""
GRAPH = "blip2/1/decoder.onnx"
CODE = "blip2/1/model.py"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle at a hostile path, with a graph that is none."""
    bundle = tmp_path / HOSTILE / "bundle"
    bundle.mkdir(parents=True)
    write_models(bundle, make_manifest())
    (bundle / GRAPH).write_text("abc")
    describe(bundle)
    return bundle


def describe(bundle: Path, **changes: FileEntry) -> None:
    """Write the manifest that tells the truth, but for ``changes``."""
    files = {
        path.relative_to(bundle).as_posix(): FileEntry(bytes=path.stat().st_size, sha256=sha256(path))
        for path in bundle.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    make_manifest().model_copy(update={"files": {**files, **changes}}).dump(bundle)


# --- bundle ----------------------------------------------------------------------------------------------------------


def write(name: str, text: str, *, named: bool = False) -> Any:
    def change(bundle: Path) -> None:
        (bundle / name).parent.mkdir(exist_ok=True, parents=True)
        (bundle / name).write_text(text)
        if named:
            describe(bundle)

    return change


def replace_manifest(make: Any) -> Any:
    def change(bundle: Path) -> None:
        (bundle / "manifest.json").unlink()
        make(bundle / "manifest.json")

    return change


def remove(*names: str) -> Any:
    return lambda bundle: [(bundle / name).unlink() for name in names]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (remove(GRAPH, "qformer/config.pbtxt"), r"it lacks blip2/1/decoder\.onnx, qformer/config\.pbtxt$"),
        (write(GRAPH, "ab"), r"blip2/1/decoder\.onnx has 2 bytes and should have 3$"),
        (write(GRAPH, "abd"), r"blip2/1/decoder\.onnx has other contents than its hash says$"),
        (write(CODE, "import evil", named=True), "not Blipstream's, remove it: blip2/1/model.py$"),
        (write("blip2/1/numpy.py", ""), "not Blipstream's, remove it: blip2/1/numpy.py$"),
        (write("blip2/1/numpy.py", "", named=True), "not Blipstream's, remove it: blip2/1/numpy.py$"),
        (write("blip2/triton_python_backend_stub", ""), "remove it: blip2/triton_python_backend_stub$"),
        (write("extra/config.pbtxt", ""), "remove it: extra/config.pbtxt$"),
        (lambda bundle: describe(bundle, **{"../x": FileEntry(bytes=1, sha256="")}), r"files outside of it: \.\./x$"),
        (remove("manifest.json"), "is not a bundle: it holds no manifest.json"),
        (replace_manifest(Path.mkdir), "is not a bundle: it holds no manifest.json"),
        (replace_manifest(os.mkfifo), "is not a bundle: it holds no manifest.json"),
        (replace_manifest(lambda path: path.write_bytes(b"\xff")), "manifest.json is not a valid manifest"),
    ],
)
def test_a_bundle_that_is_not_served(change: Any, fault: str, bundle: Path) -> None:
    change(bundle)
    with pytest.raises(BundleError, match=fault) as caught:
        TritonServer(bundle).start()
    assert str(bundle) in str(caught.value)


def test_a_file_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    for path in (tmp_path / "README.md", tmp_path / "nothing", tmp_path / ("x" * 300)):
        with pytest.raises(BundleError, match=r"is not a bundle|File name too long"):
            check_bundle(path)


def test_large_files_are_hashed_when_asked(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blipstream.bundle.ALWAYS_HASHED", 2)
    (bundle / GRAPH).write_text("abd")
    for name in ("__pycache__", "notes"):
        (bundle / name).mkdir()  # what cannot be run may be there
    assert check_bundle(bundle).decoder.max_sequences == 4
    with pytest.raises(BundleError, match="has other contents"):
        check_bundle(bundle, verify=True)


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "safe"),
    [
        ("/tmp/a-b_c.d/1", True),
        *((f"/tmp/{character}x", False) for character in " '\"$`;&|<>(){}[]*?~!#%=,:\\\n\u00fc\u0661\udcff"),
        ("relative", False),
        ("-x", False),
    ],
)
def test_what_a_shell_takes_as_it_is(path: str, safe: bool) -> None:
    assert is_safe(Path(path)) is safe
    assert not safe or shlex.quote(path) == path


def test_the_server_sees_no_path_of_the_user(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Command, folders and environment of the server, from a bundle, packages and TMPDIR in hostile places."""
    hostile = bundle.parent
    monkeypatch.setattr(tempfile, "tempdir", str(hostile))
    monkeypatch.setattr(sys, "executable", str(hostile / "venv" / "bin" / "python"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(hostile / "site-packages")])
    folder = ServerFolder()
    try:
        folder.fill(bundle, make_manifest(), embedded=True)
        environment = Installation.find().environment(1, folder.safe)
        command = TritonServer(bundle)._command(Installation.find(), folder, "prefix_")
        lists = [environment[name].split(os.pathsep) for name in ("LD_LIBRARY_PATH", "PATH", "PYTHONPATH")]
        assert all(is_safe(Path(path)) for paths in lists for path in paths)
        assert not [argument for argument in command[1:] if str(hostile) in argument or "PWNED" in argument]
        assert (folder.bundle / GRAPH).read_text() == "abc"
        assert (folder.path / Path(environment["PATH"].split(os.pathsep)[0]).parent).readlink() == hostile / "venv"
        assert folder.restore(f"cannot load {folder.bundle / GRAPH}") == f"cannot load {bundle / GRAPH}"
        names = {path.relative_to(folder.models).as_posix() for path in folder.models.rglob("*") if path.is_file()}
        assert CODE in names
        assert GRAPH not in names
    finally:
        folder.close()
    assert not folder.path.exists()
    assert bundle.is_dir()


def test_the_bundles_own_code_is_not_what_runs(bundle: Path) -> None:
    (bundle / CODE).write_text("import evil")
    (bundle / "blip2" / "config.pbtxt").write_text('name: "$(touch PWNED)"')
    folder = ServerFolder()
    folder.fill(bundle, make_manifest(), embedded=True)
    contents = "".join(path.read_text() for path in folder.models.rglob("*.p*") if path.is_file())
    folder.close()
    assert "DecoderModel" in contents
    assert "evil" not in contents
    assert "PWNED" not in contents


@pytest.mark.parametrize("name", ["$(touch PWNED)", "long" * 20])
def test_a_place_that_is_passed_over(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    folder = ServerFolder()
    folder.close()
    assert folder.path.parent == Path("/tmp")
    assert folder.environment() == {"BLIPSTREAM_BUNDLE": f"{folder.path}/bundle", "TMPDIR": str(folder.path)}
    assert len(f"{folder.path}/pymp-12345678/listener-12345678") < 108, "where multiprocessing puts a socket"


def test_no_place_for_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: str) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder_module.tempfile, "mkdtemp", refuse)
    with pytest.raises(ServerStartError, match=r"none can be made in .*/tmp \(No space left on device\)"):
        ServerFolder()


def test_a_full_disk_is_one_sentence(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = ServerFolder()
    monkeypatch.setattr(folder_module, "write_models", refuse)
    with pytest.raises(ServerStartError, match=rf"folder {folder.path} cannot be written: No space left on device"):
        folder.fill(bundle, make_manifest(), embedded=True)
    assert not folder.path.exists()


def test_files_have_names_in_utf8(bundle: Path) -> None:
    with utf8_path(bundle / GRAPH) as name:
        assert name.isascii()
        assert Path(name).read_text() == "abc"
    with utf8_path(Path("/tmp/\u00fc")) as name:
        assert name == "/tmp/\u00fc"


# --- environment -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("BASH_ENV", "/x", None),
        ("BASH_FUNC_exec%%", "() { touch PWNED; }", None),
        ("SHELLOPTS", "xtrace", None),
        ("PYTHONHOME", "/x", None),
        ("PYTHONHASHSEED", "1", "1"),
        ("BLIPSTREAM_QUEUE_SIZE", "$(touch PWNED)", "$(touch PWNED)"),
    ],
)
def test_what_of_the_environment_is_handed_on(
    name: str, value: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert Installation.find().environment(1).get(name) == expected


def test_any_path_can_be_said() -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, "latin-1")
    _say(Console(file=stream), "Loading \u65e5\udcff\x1b")
    stream.flush()
    assert written.getvalue() == b"Loading \\u65e5\\ufffd\\ufffd\n"


def test_a_signal_is_not_lost_in_a_finalizer() -> None:
    class Swallowing:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, _StopSignals() as signals:
        patch.setattr(sys, "unraisablehook", lambda _: None)
        signals.check()
        Swallowing()
        with pytest.raises(KeyboardInterrupt):
            signals.check()


@pytest.mark.parametrize(
    ("options", "variables", "expected"),
    [
        ([], {"BLIPSTREAM_QUEUE_SIZE": "7", "BLIPSTREAM_PREFILL_BUDGET": "9"}, (7, 9)),
        (["--queue-size", "5"], {"BLIPSTREAM_QUEUE_SIZE": "7"}, (5, ServerConfig().prefill_budget)),
    ],
)
def test_serve_reads_settings_from_the_environment(
    options: list[str], variables: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, config: ServerConfig, **__: object) -> None:
        raise ServerStartError(f"settings {config.queue_size} {config.prefill_budget}")

    monkeypatch.setattr(server_module, "TritonServer", refuse)
    result = CliRunner().invoke(app, ["serve", *options, "bundle"], env=variables)
    assert (result.exit_code, result.stderr) == (1, "blipstream serve: settings {} {}\n".format(*expected))


def test_relative_import_folders_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"rel::{tmp_path}")
    monkeypatch.chdir(tmp_path)
    find = lambda: Installation.find().environment(1)["PYTHONPATH"].split(os.pathsep)[-2:]  # noqa: E731
    assert find() == [str(tmp_path / "rel"), str(tmp_path)]
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert find()[1:] == [str(tmp_path)]
    assert "rel" not in find()


@pytest.mark.parametrize(
    ("free", "path", "fault"),
    [
        (LEAST_SHARED_BYTES - 1, os.defpath, r"/dev/shm has 16 MiB free, and the server needs 16 MiB to start"),
        (1 << 40, "/nowhere", "bash is not installed"),
    ],
)
def test_a_machine_that_will_not_do(free: int, path: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_shared_bytes", lambda: free)
    with pytest.raises(ServerStartError, match=fault):
        check_machine({"PATH": path})


def test_little_shared_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_shared_bytes", lambda: 64 << 20)
    said = shared_memory_warning(make_manifest(), ServerConfig())
    assert said is not None
    assert said.startswith("/dev/shm has 64 MiB free, and with images of up to 64 MiB the server may need 1")
    assert shared_memory_warning(make_manifest(), ServerConfig(max_image_bytes=1 << 20)) is None


# --- starts that fail ------------------------------------------------------------------------------------------------


def test_a_dead_model_is_noticed() -> None:
    """A guard with a server with a model that ends and is not waited for."""
    server = "import os, time\npid = os.fork() or os._exit(1)\nprint(flush=True)\ntime.sleep(60)"
    guard = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {server!r}])"
    with subprocess.Popen([sys.executable, "-c", guard], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert not has_dead_model(process.pid)
        assert process.stdout is not None
        process.stdout.readline()
        while not has_dead_model(process.pid):
            assert process.poll() is None
        os.killpg(process.pid, 9)


@pytest.mark.parametrize(
    ("said", "starts"),
    [(["boost::interprocess::lock_exception"], 3), (["Socket '127.0.0.1:9' already in use"], 3), (["other"], 1)],
)
def test_passing_faults_are_tried_again(
    said: list[str], starts: int, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[Manifest] = []

    def fail(_: TritonServer) -> None:
        raise ServerStartError(f"tritonserver did not start: {said[-1]}")

    monkeypatch.setattr(TritonServer, "_launch", lambda _, *arguments: launched.append(arguments[1]))
    monkeypatch.setattr(TritonServer, "_wait_until_ready", fail)
    monkeypatch.setattr(TritonServer, "log_tail", property(lambda _: said))
    monkeypatch.setattr(server_module, "choose_ports", dict)
    with pytest.raises(BlipstreamError, match="did not start"):
        TritonServer(bundle).start()
    assert len(launched) == starts


def test_a_log_that_cannot_be_written_does_not_hold_up_the_server() -> None:
    read, end = os.pipe()
    with Path("/dev/full").open("wb", buffering=0) as full:
        pump = LogPump(os.fdopen(read, "rb"), lambda line: full.write(line.encode()), rewrite=str.upper)
        with os.fdopen(end, "wb") as stream:
            stream.write(b"a\nb\n")
        pump.join()
    assert pump.tail() == ["A", "B"]
    assert pump.fault is not None
    assert pump.fault.errno == errno.ENOSPC
