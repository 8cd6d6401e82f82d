"""What a bundle says of itself: ``manifest.json``, section by section."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from blipstream.contract import QUESTION_TEMPLATE, QUESTION_TEMPLATE_PARAMETER, ModelSpec, TensorSpec, triton_models
from blipstream.errors import BundleError

BUNDLE_REVISION = 2
"""Revision of the bundle's layout; a bundle of another revision is refused."""

MANIFEST_FILE = "manifest.json"
PARITY_FILE = "parity.json"
LAYERS_FILE = "layers.json"
"""Where each TensorRT engine departs from its graph, if that was asked for."""

EngineName = Literal["onnxruntime", "onnxruntime-cuda", "tensorrt"]
"""What runs the graphs of a bundle: ONNX Runtime on the CPU or on a GPU, or TensorRT."""

PLAN_SUFFIX = ".plan"
"""In a bundle for TensorRT, the engine that was built from a graph has the graph's name with this suffix."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ImageSection(_Section):
    """How an image becomes ``pixel_values``: the checkpoint's image processor, as plain numbers."""

    size: int
    """Height and width in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"]
    rescale_factor: float


class VisionSection(_Section):
    """Sizes of the vision encoder."""

    num_image_tokens: int
    hidden_size: int
    num_layers: int
    num_frames: int = 1
    """Images of one request, each read by itself: the frames of a video in their order, or a single picture."""


class InstructionSection(_Section):
    """What the Q-Former reads of an instruction."""

    vocab_size: int
    max_tokens: int
    """Tokens of an instruction at most, special tokens included: the positions that the Q-Former knows."""
    pad_token_id: int
    """Fills the ids of shorter instructions in a batch; the mask hides it."""


class QFormerSection(_Section):
    """Sizes of the Q-Former."""

    num_query_tokens: int
    hidden_size: int
    num_layers: int
    instruction: InstructionSection | None = None
    """Set where the Q-Former reads the request's text as well (InstructBLIP)."""


class EncoderSection(_Section):
    """What a language model with an encoder has besides: the cache of what its decoder reads of the encoder."""

    num_heads: int
    """Heads of the cross-attention."""
    head_dim: int
    max_tokens: int
    """Tokens of one row of the cross-attention's cache: soft tokens + prompt."""
    decoder_start_token_id: int
    """Every answer begins behind this token, which is not part of it."""


class DecoderSection(_Section):
    """Sizes of the language model and of its KV cache."""

    family: str
    """Kind of language model: its ``model_type`` in transformers."""
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    """Width of the token embeddings that soft tokens share (``word_embed_proj_dim`` for OPT)."""
    vocab_size: int
    max_sequences: int
    """Rows of the KV cache: sequences that decode at once."""
    max_tokens: int
    """Tokens of one row: soft tokens + prompt + generated; behind an encoder, the start token + generated."""
    encoder: EncoderSection | None = None

    @property
    def max_prompt_tokens(self) -> int:
        """Soft tokens + prompt at most."""
        return self.max_tokens - 1 if self.encoder is None else self.encoder.max_tokens

    def room_behind(self, prompt_tokens: int) -> int:
        """New tokens for which there is room behind a prompt of so many tokens; 0 when the prompt is too long."""
        if prompt_tokens > self.max_prompt_tokens:
            return 0
        return self.max_tokens - (prompt_tokens if self.encoder is None else 1)


class GenerationSection(_Section):
    """Defaults of the checkpoint's own ``generate``, and the ids that frame a prompt."""

    empty_prompt_ids: tuple[int, ...]
    """What stands behind the soft tokens when a request has no text: how a plain caption begins."""
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    image_token_id: int | None
    """Id of the soft tokens' placeholder; the repetition penalty sees it, as it does in transformers."""
    max_new_tokens: int
    """New tokens when a request does not say."""
    repetition_penalty: float = 1.0
    question_template: str = QUESTION_TEMPLATE
    """What clients put a question into, in place of ``{}``, unless they have their own."""


Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4"]
"""How a stage's weights are stored and computed with; docs/precision.md."""

HardwareLevel = Literal["none", "same", "ampere+"]
"""Which GPUs load a TensorRT engine besides the kind that built it: those of the same compute capability, or all from
Ampere on."""


class PlanSection(_Section):
    """With what, on what and how the TensorRT engines of a bundle were built."""

    tensorrt: str
    """Version of TensorRT."""
    gpu: str
    """Name of the GPU."""
    compute_capability: str
    """As in ``9.0``."""
    version_compatible: bool
    """Whether later versions of TensorRT load the engines."""
    hardware: HardwareLevel
    plugins: bool
    """Whether they hold Blipstream's own kernels."""
    seconds: dict[str, float]
    """Build time of each engine, by its path relative to the bundle."""


class FileEntry(_Section):
    """One file of the bundle."""

    bytes: int
    sha256: str


_CACHED_BYTES = 16 << 20
"""Of activations that a CPU's caches are taken to hold."""


class Manifest(_Section):
    """Contents of ``manifest.json``."""

    revision: int
    kind: str
    """Image side and language model, as in ``blip2-opt``."""
    source: str
    """Name of the checkpoint: its folder's name or its hub id."""
    commit: str | None = None
    """Commit of the checkpoint on the hub, where it is known."""
    engine: EngineName
    plans: PlanSection | None = None
    """Set in a bundle for TensorRT."""
    max_batch: int = 8
    """Images that the vision encoder, or the Q-Former, reads at once."""
    precision: dict[str, Precision]
    """Precision of each stage: ``vision_encoder``, ``qformer``, ``decoder``."""
    image: ImageSection
    vision: VisionSection
    qformer: QFormerSection
    decoder: DecoderSection
    generation: GenerationSection
    versions: dict[str, str]
    """Versions of the packages that built the bundle."""
    files: dict[str, FileEntry]
    """Every other file of the bundle (``parity.json`` excepted), by its path relative to the bundle."""

    def dims(self) -> Mapping[str, int]:
        """Value of each named dimension of a :class:`TensorSpec`."""
        return {
            "image_size": self.image.size,
            "num_image_tokens": self.vision.num_image_tokens,
            "vision_hidden_size": self.vision.hidden_size,
            "num_query_tokens": self.qformer.num_query_tokens,
            "decoder_hidden_size": self.decoder.hidden_size,
        }

    @property
    def preferred_images(self) -> int:
        """Images that the ViT had better read at once.

        On a CPU no more than those whose widest activations, four times as wide as an image token in fp32, stay in its
        caches: ViT-g takes 0.42 s for one image or for each of two, and 0.52 for each of eight.
        """
        if self.engine != "onnxruntime":
            return self.max_batch
        widest = self.vision.num_image_tokens * 4 * self.vision.hidden_size * 4
        return max(1, min(self.max_batch, _CACHED_BYTES // widest))

    @property
    def models(self) -> tuple[ModelSpec, ...]:
        """The Triton models of this bundle."""
        return triton_models(instructed=self.qformer.instruction is not None)

    def graph_file(self, name: str) -> str:
        """File of this bundle that runs the graph called ``name``, in the same folder."""
        return str(Path(name).with_suffix(PLAN_SUFFIX)) if self.engine == "tensorrt" else name

    @property
    def config_values(self) -> Mapping[str, int | str]:
        """Value of each placeholder of the Triton models' configurations."""
        profiles = '"0"' if self.max_batch == 1 else '"0", "1"'
        sizes = {"max_sequences": self.decoder.max_sequences, "max_batch": self.max_batch}
        sizes["preferred_images"] = self.preferred_images
        template = json.dumps(self.generation.question_template, ensure_ascii=False)[1:-1]
        return {**self.dims(), **sizes, "profiles": profiles, QUESTION_TEMPLATE_PARAMETER: template}

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """Shape of a tensor in this bundle, without the batch dimension."""
        dims = self.dims()
        return tuple(dim if isinstance(dim, int) else dims[dim] for dim in spec.shape)

    @classmethod
    def load(cls, bundle: Path) -> Manifest:
        """Read ``manifest.json`` of a bundle.

        Raises:
            BundleError: no manifest, one that cannot be read, another revision, or fields missing or wrong (all of them
                are named).
        """
        path = bundle / MANIFEST_FILE
        try:
            if not path.is_file():  # a pipe would be waited for
                raise BundleError(
                    f"{bundle} is not a bundle: it holds no {MANIFEST_FILE}; `blipstream build` writes one"
                )
            text = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}") from None
        try:
            head = _Revision.model_validate_json(text)
            if head.revision != BUNDLE_REVISION:
                raise BundleError(
                    f"{path} is of bundle revision {head.revision}, and this version of Blipstream reads revision "
                    f"{BUNDLE_REVISION}: build the bundle again"
                )
            return cls.model_validate_json(text)
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
            raise BundleError(f"{path} is not a valid manifest: {faults}") from None

    def dump(self, bundle: Path) -> None:
        """Write ``manifest.json`` into a bundle."""
        (bundle / MANIFEST_FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


class _Revision(BaseModel):
    revision: int
