"""The kinds of checkpoint that are served: what reads the image, and the language model that answers.

The two are independent of each other: one line for each image side, one for each language model, and any pair of them
is a family. What a language model needs beyond its line is a module of its own (:class:`LanguageModule`);
``docs/adding-a-model.md`` shows how one is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from blipstream.contract import QUESTION_TEMPLATE
from blipstream.errors import UnsupportedCheckpointError

if TYPE_CHECKING:
    from blipstream.manifest import DecoderSection
    from blipstream_export.graphs import Graph


class LanguageModule(Protocol):
    """What the module of a language model has: four functions. ``config`` is its configuration in transformers."""

    def check_config(self, config: Any, source: str) -> None:
        """Refuse, by name, what is not served; ``source`` names the checkpoint.

        Raises:
            UnsupportedCheckpointError: a configuration that is not served.
        """

    def max_positions(self, config: Any) -> int | None:
        """Longest sequence that the model can read, in tokens; None when there is no limit."""

    def decoder_section(self, config: Any, *, max_sequences: int, max_tokens: int) -> DecoderSection:
        """The manifest's section for ``max_sequences`` rows of ``max_tokens`` tokens, as the user counts them."""

    def graphs(self, model: Any, sizes: DecoderSection) -> Iterator[Graph]:
        """The graphs to export, each made when it is asked for.

        Args:
            model: the language model of transformers.
            sizes: what :meth:`decoder_section` gave.
        """


@dataclass(frozen=True)
class LanguageModel:
    """A kind of language model: its ``model_type`` in ``config.json``, and the module that exports it."""

    model_type: str
    module: str

    def load(self) -> LanguageModule:
        """The module; it is imported when it is needed, and torch with it."""
        return cast("LanguageModule", import_module(self.module))


@dataclass(frozen=True)
class ImageSide:
    """A kind of Q-Former and of what surrounds it.

    ``model_type`` is that of ``config.json``; the others are names of classes in transformers.
    """

    name: str
    model_type: str
    architecture: str
    config: str
    processor: str
    instructed: bool = False
    """Whether the Q-Former reads the prompt as well, by a tokenizer of its own."""
    num_frames: int = 1
    """Images of one request, each read by itself; their soft tokens stand one image's behind the other's."""
    placeholder: str = "<image>"
    """The token that stands for one soft token in a prompt's ids."""
    placeholder_field: str = "image_token_index"
    """Where the configuration has its id."""
    features: str = "get_image_features"
    """The model's method that runs ViT, Q-Former and projection."""
    question_template: str = QUESTION_TEMPLATE
    """How it was shown questions."""


LANGUAGE_MODELS = (
    LanguageModel("opt", "blipstream_export.models.opt"),
    LanguageModel("llama", "blipstream_export.models.llama"),
    LanguageModel("t5", "blipstream_export.models.t5"),
)

IMAGE_SIDES = (
    ImageSide("blip2", "blip-2", "Blip2ForConditionalGeneration", "Blip2Config", "Blip2Processor"),
    ImageSide(
        "instructblip", "instructblip", "InstructBlipForConditionalGeneration", "InstructBlipConfig",
        "InstructBlipProcessor", instructed=True, question_template="{}",
    ),
    ImageSide(
        "instructblipvideo", "instructblipvideo", "InstructBlipVideoForConditionalGeneration",
        "InstructBlipVideoConfig", "InstructBlipProcessor", instructed=True, num_frames=4, placeholder="<video>",
        placeholder_field="video_token_index", features="get_video_features", question_template="{}",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """An image side and a language model."""

    image_side: ImageSide
    language: LanguageModel

    @property
    def kind(self) -> str:
        """Name of the family, as in ``blip2-opt``."""
        return f"{self.image_side.name}-{self.language.model_type}"


def find_family(config: Mapping[str, Any], source: str) -> Family:
    """The family of a checkpoint with this ``config.json``.

    Raises:
        UnsupportedCheckpointError: none fits; the message names what was found and what is served.
    """
    for name in ("text_config", "vision_config", "qformer_config"):
        if not isinstance(config.get(name) or {}, dict):
            raise UnsupportedCheckpointError(f"{name} of {source} must be a JSON object, but it is {config[name]!r}")
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    text_model_type = (config.get("text_config") or {}).get("model_type", "opt")  # the default of transformers
    for image_side in IMAGE_SIDES:
        if image_side.model_type == model_type and (not architectures or image_side.architecture in architectures):
            for language in LANGUAGE_MODELS:
                if language.model_type == text_model_type:
                    return Family(image_side, language)
    found = f"model_type {model_type!r}" + (f", architecture {', '.join(architectures)}" if architectures else "")
    if "text_config" in config:
        found += f", language model {text_model_type!r}"
    sides = ", ".join(image_side.architecture for image_side in IMAGE_SIDES)
    languages = ", ".join(repr(language.model_type) for language in LANGUAGE_MODELS)
    raise UnsupportedCheckpointError(
        f"the checkpoint {source} is of a kind that Blipstream does not serve ({found}); it serves {sides} with a "
        f"language model of type {languages}"
    )
