"""Where a checkpoint is: in a folder, or on the hub at a revision."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from blipstream.errors import CheckpointError
from blipstream_export.faults import first_line
from blipstream_export.weights import ADAPTER_FILE, adapter_fault, foreign_weights

CONFIG_FILE = "config.json"
_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_CACHED = re.compile(r".*/models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})")
_CAUSES = {
    "RepositoryNotFoundError": "there is no such repository, or it is private",
    "RevisionNotFoundError": "it has no such revision",
    "GatedRepoError": "its licence has to be accepted there, and a token given with `hf auth login`",
}
"""What huggingface_hub's errors mean, whose messages begin with a status of HTTP."""
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_WEIGHT_FILES = ("*.safetensors",)


@dataclass(frozen=True)
class Place:
    """A folder, and where it came from."""

    folder: Path
    name: str
    """The folder's name, or the hub id."""
    commit: str | None = None
    """The commit on the hub, where it is known."""
    hub: bool = False
    """Whether only its small files are sure to be there, until :func:`fetch_weights`."""


def locate(source: str, revision: str | None = None) -> Place:
    """Find a folder, or download the small files of a hub id; ``owner/name@revision`` says the revision as well.

    Raises:
        CheckpointError: neither is there, or the revision is given twice or for a folder.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"a revision ({revision}) belongs to a hub id, and {source} is a folder")
        folder = path.resolve()
        _check_folder(folder)
        cached = _CACHED.fullmatch(folder.as_posix())
        if cached:
            return Place(folder, f"{cached['owner']}/{cached['name']}", cached["commit"])
        return Place(folder, folder.name)
    if path.exists():
        raise CheckpointError(_not_a_folder(source, path))
    match = _HUB_ID.fullmatch(source)
    if match is None:
        raise CheckpointError(f"there is no folder {source}, and a hub id would read owner/name or owner/name@revision")
    if revision is not None and match["revision"] is not None:
        raise CheckpointError(f"{source} names a revision, and {revision} was given as another one")
    folder = _download(match["id"], revision or match["revision"], _SMALL_FILES)
    return Place(folder, match["id"], folder.name, hub=True)


def fetch_weights(place: Place) -> None:
    """Download the weights of a checkpoint on the hub, if they are not there yet.

    Raises:
        CheckpointError: the hub does not give them, or holds them in another format.
    """
    if not place.hub:
        return
    _download(place.name, place.commit, _WEIGHT_FILES)
    if any(place.folder.glob(_WEIGHT_FILES[0])):
        return
    import huggingface_hub

    names: list[str] = []
    with suppress(CheckpointError), _hub_faults(place.name):  # out of reach: what is cached then decides
        names = huggingface_hub.HfApi().list_repo_files(place.name, revision=place.commit)
    if fault := foreign_weights(place.name, names):
        raise CheckpointError(fault)


def _download(hub_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub

    with _hub_faults(hub_id if revision is None else f"{hub_id}@{revision}"):
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))


@contextmanager
def _hub_faults(what: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # huggingface_hub and its HTTP client raise many kinds
        cause = _CAUSES.get(type(error).__name__, first_line(error))
        raise CheckpointError(
            f"there is no folder {what}, and the hub did not give a checkpoint of that id: {cause}"
        ) from error


def _check_folder(folder: Path) -> None:
    """Refuse a folder beside the right one, by that one's name."""
    if (folder / CONFIG_FILE).is_file():
        return
    if (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(adapter_fault(folder))
    near = [*folder.glob(f"*/{CONFIG_FILE}"), *folder.glob(f"snapshots/*/{CONFIG_FILE}"), folder.parent / CONFIG_FILE]
    found = [str(config.parent) for config in sorted(near) if config.is_file()]
    if found:
        raise CheckpointError(f"the checkpoint {folder} holds no {CONFIG_FILE}: did you mean {' or '.join(found[:3])}?")


def _not_a_folder(source: str, path: Path) -> str:
    fault = f"{source} is a file, but a checkpoint is a folder in the Hugging Face layout or a hub id"
    if (path.resolve().parent / CONFIG_FILE).is_file():
        return f"{fault}: did you mean {path.absolute().parent}?"
    return f"{fault}; a .pth file of LAVIS is given with --lavis" if path.suffix == ".pth" else fault
