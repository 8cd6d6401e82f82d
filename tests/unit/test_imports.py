"""What may be imported without what: the client without the server, the server without torch."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import blipstream_client
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from blipstream.extras import install

TRAINING = ("torch", "transformers")
ENGINES = ("onnxruntime", "tensorrt", "pytriton")
CLIENT = ("tritonclient", "grpc")

_WALK = """
import importlib, pkgutil
for name in ("blipstream", "blipstream_client"):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if module.name not in ("blipstream.engines.cuda", "blipstream.engines.tensorrt"):  # these need a GPU's packages
            importlib.import_module(module.name)
"""
_HIDE = """
import sys
for name in {hidden!r}:
    sys.modules[name] = None
"""


def imported_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has imported after running ``code``."""
    report = "\nimport json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def run_without(hidden: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` where the packages ``hidden`` cannot be imported, as if they were not installed."""
    command = [sys.executable, "-c", _HIDE.format(hidden=hidden) + code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line_is_cheap_to_import() -> None:
    assert imported_by("import blipstream.cli").isdisjoint((*TRAINING, *ENGINES, *CLIENT))


def test_no_module_of_serving_or_of_the_client_needs_torch() -> None:
    imported = imported_by(_WALK)
    assert {"blipstream", "blipstream_client"} <= imported
    assert imported.isdisjoint(TRAINING)
    assert "triton_python_backend_utils" not in imported


def test_the_client_needs_no_engine() -> None:
    imported = imported_by("import blipstream_client")
    assert "grpc" in imported
    assert imported.isdisjoint((*TRAINING, *ENGINES))


def test_the_commands_say_which_extra_is_missing(tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(b"any")
    for arguments in (["caption", str(image)], ["ask", str(image), "what?"], ["chat", str(image)]):
        done = run_without(CLIENT, f"from blipstream.cli import app; app({arguments!r})")
        assert install("client") in done.stderr
        assert "Traceback" not in done.stderr
        assert done.returncode == 1


def test_the_command_line_works_in_an_install_of_the_client_alone() -> None:
    hidden = (*TRAINING, *ENGINES, "onnx", "onnxscript", "PIL", "tokenizers", "safetensors")
    done = run_without(
        hidden, "from blipstream.cli import app; app(['caption', '--url', '127.0.0.1:1', 'missing.png'])"
    )
    assert "missing.png" in done.stderr
    assert "No such file" in done.stderr
    assert done.returncode == 1


def test_version() -> None:
    done = run_without((), "from blipstream.cli import app; app(['--version'])")
    assert done.stdout.strip() == f"blipstream {importlib.import_module('blipstream').__version__}"


def installed_by(root: str) -> set[str]:
    """Names of all packages that installing ``root`` brings, as far as the metadata of installed packages tell."""
    waiting, seen = [Requirement(root)], set()
    while waiting:
        requirement = waiting.pop()
        package = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if package in seen:
            continue
        seen.add(package)
        try:
            lines = requires(requirement.name) or []
        except PackageNotFoundError:
            continue
        for needed in map(Requirement, lines):
            extras = {"", *requirement.extras}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return {name for name, _ in seen}


@pytest.mark.parametrize(
    ("extra", "needed", "never"),
    [
        ("client", {"tritonclient", "grpcio"}, {"nvidia-pytriton", "onnxruntime", "tensorrt", *TRAINING}),
        ("server", {"nvidia-pytriton", "onnxruntime", "tokenizers"}, set(TRAINING)),
        ("export", {"torch", "transformers", "onnxruntime"}, set()),
    ],
)
def test_what_an_extra_installs(extra: str, needed: set[str], never: set[str]) -> None:
    installed = installed_by(f"blipstream[{extra}]")
    assert needed <= installed
    assert installed.isdisjoint(never)


def test_public_names_of_the_client() -> None:
    public = {name for name in vars(blipstream_client) if not name.startswith("_")}
    modules = {name for name in public if f"blipstream_client.{name}" in sys.modules}
    assert set(blipstream_client.__all__) == public - modules - {"annotations"}
    assert len(set(blipstream_client.__all__)) == len(blipstream_client.__all__)
