"""The Triton models that the package brings: the ``config.pbtxt`` templates and the ``model.py`` of each."""

from __future__ import annotations

import shutil
import string
from collections.abc import Mapping
from pathlib import Path

from blipstream.contract import MODEL_NAMES, MODEL_VERSION
from blipstream.errors import BundleError
from blipstream.manifest import Manifest

PYTHON = "python"
"""The backend of Triton that every model has a configuration for."""

CONFIG_FILE = "config.pbtxt"
CODE_FILE = "model.py"


def model_repository() -> Path:
    """The Triton models that a bundle is made of: inside the wheel, or in the source tree of an editable install.

    Raises:
        BundleError: neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "model_repository", package.parents[1] / "model_repository"):
        if folder.is_dir():
            return folder
    raise BundleError(f"the Triton models are missing: expected {package / 'model_repository'}, as the wheel has it")


def own_code(model: str) -> bytes:
    """Contents of a model's ``model.py``; empty where it has none."""
    path = model_repository() / model / MODEL_VERSION / CODE_FILE
    return path.read_bytes() if path.is_file() else b""


def write_models(folder: Path, manifest: Manifest, *, embedded: bool = False) -> None:
    """Write the Triton models of a bundle, without its graphs, into a folder.

    Args:
        folder: becomes, or is, a model repository.
        manifest: of the bundle.
        embedded: configure every model for Triton's Python backend, whatever the engine.

    Raises:
        BundleError: a model of the contract is missing.
    """
    backend = manifest.engine if manifest.engine == "tensorrt" and not embedded else PYTHON
    instructed = manifest.qformer.instruction is not None
    copy_models(folder, manifest.config_values, instructed=instructed, backend=backend)


def copy_models(
    bundle: Path, values: Mapping[str, int | str], *, instructed: bool = False, backend: str = PYTHON
) -> None:
    """Copy every Triton model into the bundle, with ``$name`` in each ``config.pbtxt`` replaced by ``values[name]``.

    Args:
        bundle: the folder.
        values: sizes by name.
        instructed: whether the Q-Former reads instructions; models with another configuration then have it beside
            the plain one, as ``config.instructed.pbtxt``.
        backend: of Triton, for the models that another than Python's can run; these have a configuration for it, as
            ``config.tensorrt.pbtxt``.

    Raises:
        BundleError: a model of the contract is missing, or a configuration uses a name that has no value.
    """
    source = model_repository()
    for name in MODEL_NAMES:
        model, target = source / name, bundle / name
        if not (model / CONFIG_FILE).is_file():
            raise BundleError(f"the Triton model {name} is missing: expected {model / CONFIG_FILE}")
        shutil.copytree(
            model,
            target,
            dirs_exist_ok=True,
            copy_function=shutil.copyfile,
            ignore=shutil.ignore_patterns("__pycache__", ".*", "*.pyc", "*.pbtxt"),
        )
        (target / MODEL_VERSION).mkdir(exist_ok=True)  # an ensemble's is empty, and git keeps no such folder
        text = _fill(_template(model, instructed, backend), values)
        (target / CONFIG_FILE).write_text(text, encoding="utf-8")


def _template(model: Path, instructed: bool, backend: str) -> Path:
    kind = "instructed." if instructed and (model / "config.instructed.pbtxt").is_file() else ""
    other = model / f"config.{kind}{backend}.pbtxt"
    return other if other.is_file() else model / f"config.{kind}pbtxt"


def _fill(config: Path, values: Mapping[str, int | str]) -> str:
    try:
        return string.Template(config.read_text(encoding="utf-8")).substitute(values)
    except (KeyError, ValueError) as error:
        raise BundleError(
            f"{config} uses a placeholder that has no value ({error}); there are {', '.join(sorted(values))}"
        ) from None
