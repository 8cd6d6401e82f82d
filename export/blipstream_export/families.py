"""The kinds of checkpoint that are served: one line each, and a module for the language model's decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol

from blipstream.errors import UnsupportedCheckpointError


class DecoderWrapper(Protocol):
    """What the exporter reads of a decoder-only language model's wrapper, an ``nn.Module``."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    """Size of a head in the cache, padding included."""
    embed_dim: int
    """Width of the token embeddings, which soft tokens share."""
    vocab_size: int
    max_positions: int
    """Longest sequence that the model can read."""


@dataclass(frozen=True)
class Family:
    """One kind of checkpoint.

    ``decoder`` names the wrapper of the language model, as ``module:class``; it is imported when it is needed.
    """

    kind: Literal["blip2-opt"]
    model_type: str
    architecture: str
    text_model_type: Literal["opt"]
    decoder: str

    def wrap_decoder(self, language_model: Any, *, release: bool = False) -> Any:
        """Wrap the language model of transformers; see the wrapper for ``release``."""
        module, _, name = self.decoder.partition(":")
        return getattr(import_module(module), name)(language_model, release=release)


FAMILIES = (
    Family("blip2-opt", "blip-2", "Blip2ForConditionalGeneration", "opt", "blipstream_export.models.opt:OPTDecoder"),
)


def find_family(config: Mapping[str, Any], source: str) -> Family:
    """The family of a checkpoint with this ``config.json``.

    Raises:
        UnsupportedCheckpointError: none fits; the message names what was found and what is served.
    """
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    text_model_type = (config.get("text_config") or {}).get("model_type", "opt")  # the default of transformers
    for family in FAMILIES:
        if (
            (family.model_type, family.text_model_type) == (model_type, text_model_type)
            and (not architectures or family.architecture in architectures)
        ):  # fmt: skip
            return family
    found = f"model_type {model_type!r}" + (f", architecture {', '.join(architectures)}" if architectures else "")
    if "text_config" in config:
        found += f", language model {text_model_type!r}"
    served = "; ".join(f"{f.architecture} with a language model of type {f.text_model_type!r}" for f in FAMILIES)
    raise UnsupportedCheckpointError(
        f"the checkpoint {source} is of a kind that Blipstream does not serve ({found}); it serves {served}"
    )
