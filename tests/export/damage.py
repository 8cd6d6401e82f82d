"""Ways to damage a checkpoint's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import TinySizes, make_blip2_opt, make_processor
from tests.support.languages import opt_tokenizer

Fault = Callable[[Path], object]


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Fault:
    def fault(folder: Path) -> None:
        contents = json.loads((folder / name).read_text())
        change(contents)
        (folder / name).write_text(json.dumps(contents))

    return fault


def put(**values: Any) -> Fault:
    """Set fields of config.json; a name such as text_config__vocab_size reaches into a section."""

    def change(config: dict[str, Any]) -> None:
        for name, value in values.items():
            *sections, field = name.split("__")
            target = config
            for section in sections:
                target = target[section]
            target[field] = value

    return edit("config.json", change)


def processor(**values: Any) -> Fault:
    return edit("processor_config.json", lambda config: config["image_processor"].update(values))


def remove(*names: str) -> Fault:
    def fault(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return fault


def cut(name: str, keep: Callable[[int], int]) -> Fault:
    def fault(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: keep(len(data))])

    return fault


def write(name: str, data: bytes) -> Fault:
    return lambda folder: (folder / name).write_bytes(data) and None


def append(name: str, tail: bytes) -> Fault:
    return lambda folder: write(name, (folder / name).read_bytes() + tail)(folder)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Fault:
    def fault(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return fault


def both(*faults: Fault) -> Fault:
    def fault(folder: Path) -> None:
        for each in faults:
            each(folder)

    return fault


def copy(name: str, other: str) -> Fault:
    return lambda folder: shutil.copy(folder / name, folder / other)


def rename(name: str, other: str) -> Fault:
    return lambda folder: (folder / name).rename(folder / other)


def move(name: str, below: str) -> Fault:
    def fault(folder: Path) -> None:
        (folder / below).mkdir()
        (folder / name).rename(folder / below / name)

    return fault


def link(target: str, name: str) -> Fault:
    return lambda folder: (folder / name).symlink_to(target)


def shards(then: Fault) -> Fault:
    """Save the checkpoint in shards instead, and damage it then."""

    def fault(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        make_blip2_opt().save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
        then(folder)

    return fault


def other_tokenizer(**fields: Any) -> Fault:
    def fault(folder: Path) -> None:
        tokenizer = opt_tokenizer(**fields)
        make_processor(tokenizer, TinySizes()).save_pretrained(folder)

    return fault


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number]
