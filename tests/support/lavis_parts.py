"""Random parts of LAVIS checkpoints: the files that LAVIS would read, of its own structure and of any size.

    parts = save_parts(tmp_path, vit="clip")
    blipstream build --lavis parts.trained --vision parts.vision --llm parts.llm --vision-layers 2 -o bundle

As in LAVIS's files, a ViT has more than is kept of it (its last block, its final norm), keys of EVA have no bias, and
the trained part lies under ``model`` beside an optimizer. The weights are drawn wide, so that greedy text depends on
the image. torch and transformers are imported by the functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tests.support.checkpoints import draw
from tests.support.instructblip import QFORMER_POSITIONS, QFORMER_VOCAB_SIZE, make_qformer_tokenizer
from tests.support.languages import LANGUAGES

if TYPE_CHECKING:
    from torch import Tensor

VitName = Literal["eva", "clip"]
HEAD_DIMS: Mapping[str, int] = {"eva": 88, "clip": 64}
PROJECTIONS: Mapping[str, str] = {"opt": "opt_proj", "t5": "t5_proj", "llama": "llm_proj"}
SPARE_ROWS = 3
"""More rows than tokens, as published language models have: the placeholder <image> gets one."""


@dataclass(frozen=True)
class PartSizes:
    """Sizes of the ViT and the Q-Former; heads are of LAVIS's sizes."""

    image_size: int = 28
    patch_size: int = 7
    vision_heads: int = 2
    vision_blocks: int = 3
    """In the file."""
    vision_inner: int | None = None
    """Width of the feed-forward layers; of EVA; by default something odd (CLIP always has 4 times the width)."""
    num_query_tokens: int = 6
    qformer_heads: int = 1
    qformer_layers: int = 3
    cross_attention_frequency: int = 2
    text_width: int = 48

    def vision_width(self, vit: VitName) -> int:
        return self.vision_heads * HEAD_DIMS[vit]

    @property
    def qformer_width(self) -> int:
        return 64 * self.qformer_heads

    @property
    def qformer_inner(self) -> int:
        return 4 * self.qformer_width if self.qformer_heads == 12 else 2 * self.qformer_width + 3


def true_sizes(vit: VitName, *, text_width: int = 2560) -> PartSizes:
    """LAVIS's own widths, heads and patches; only the numbers of layers and patches are small."""
    return PartSizes(
        image_size=112,
        patch_size=14,
        vision_heads=16,
        vision_inner=6144 if vit == "eva" else None,
        num_query_tokens=32,
        qformer_heads=12,
        qformer_layers=2,
        text_width=text_width,
    )


@dataclass(frozen=True)
class SavedParts:
    """Paths of what was written."""

    trained: Path
    vision: Path
    llm: Path
    qformer_tokenizer: Path | None = None


def save_parts(
    folder: Path,
    vit: VitName = "eva",
    language: str = "opt",
    *,
    seed: int = 0,
    sizes: PartSizes | None = None,
    text_side: bool = False,
    text: Mapping[str, Any] | None = None,
) -> SavedParts:
    """Write the parts of a checkpoint into ``folder``.

    Args:
        folder: where they go.
        vit: the kind of ViT.
        language: the kind of language model, by its ``model_type``.
        seed: of all random numbers.
        sizes: of everything but the language model.
        text_side: give the Q-Former its layers for texts: InstructBLIP, unless the language model is OPT.
        text: overrides fields of the language model's configuration.
    """
    import torch

    sizes = sizes or PartSizes()
    folder.mkdir(parents=True, exist_ok=True)
    instructed = text_side and language != "opt"
    parts = SavedParts(
        trained=folder / "blip2_trained.pth",
        vision=folder / f"{vit}_vit.pth",
        llm=folder / "llm",
        qformer_tokenizer=folder / "bert" if instructed else None,
    )
    trained = make_trained(vit, PROJECTIONS[language], seed=seed + 1, sizes=sizes, text_side=text_side)
    torch.save({"model": trained, "optimizer": {"state": {0: torch.zeros(3)}}, "epoch": 4}, parts.trained)
    torch.save(make_vit(vit, seed=seed, sizes=sizes), parts.vision)
    width = "d_model" if language == "t5" else "hidden_size"
    save_language_model(parts.llm, language, seed=seed + 2, text={width: sizes.text_width, **(text or {})})
    if parts.qformer_tokenizer:
        make_qformer_tokenizer().save_pretrained(parts.qformer_tokenizer)
    return parts


def make_vit(vit: VitName, *, seed: int = 0, sizes: PartSizes | None = None) -> dict[str, Tensor]:
    """The file of a ViT."""
    sizes = sizes or PartSizes()
    return _drawn((_eva_shapes if vit == "eva" else _clip_shapes)(sizes), seed)


def make_trained(
    vit: VitName, projection: str, *, seed: int = 0, sizes: PartSizes | None = None, text_side: bool = False
) -> dict[str, Tensor]:
    """The trained part; with ``text_side``, the Q-Former's layers for texts are there too."""
    sizes = sizes or PartSizes()
    width, vision = sizes.qformer_width, sizes.vision_width(vit)
    shapes: dict[str, tuple[int, ...]] = {"query_tokens": (1, sizes.num_query_tokens, width)}
    shapes |= _norm("ln_vision", vision) | _norm("Qformer.bert.embeddings.LayerNorm", width)
    for index in range(sizes.qformer_layers):
        layer = f"Qformer.bert.encoder.layer.{index}"
        shapes |= _attention(f"{layer}.attention", width, width)
        if index % sizes.cross_attention_frequency == 0:
            shapes |= _attention(f"{layer}.crossattention", width, vision)
        for suffix in ("_query", "") if text_side else ("_query",):
            shapes |= _linear(f"{layer}.intermediate{suffix}.dense", sizes.qformer_inner, width)
            shapes |= _linear(f"{layer}.output{suffix}.dense", width, sizes.qformer_inner)
            shapes |= _norm(f"{layer}.output{suffix}.LayerNorm", width)
    if text_side:
        shapes["Qformer.bert.embeddings.word_embeddings.weight"] = (QFORMER_VOCAB_SIZE + 1, width)  # and [DEC]
        shapes["Qformer.bert.embeddings.position_embeddings.weight"] = (QFORMER_POSITIONS, width)
        shapes["Qformer.cls.predictions.bias"] = (QFORMER_VOCAB_SIZE + 1,)
    shapes |= _linear(projection, sizes.text_width, width)
    return _drawn(shapes, seed)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Put a changed file in the place of one of these; who has mapped the old one keeps it."""
    import torch

    contents = torch.load(path, weights_only=True)
    changed = contents | {"model": change(contents["model"])} if "model" in contents else change(contents)
    torch.save(changed, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def save_language_model(
    folder: Path, language: str = "opt", *, seed: int = 0, text: Mapping[str, Any] | None = None
) -> Path:
    """Write a random language model and its tokenizer, which knows no image token; ``text`` is of its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = LANGUAGES[language]
    tokenizer = kind.tokenizer(image_token=False)
    config = kind.config(len(tokenizer) + SPARE_ROWS, text)
    auto = AutoModelForSeq2SeqLM if language == "t5" else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            draw(f"language_model.{name}", parameter, generator)
        if language == "opt":
            model.get_input_embeddings().weight[tokenizer("\n")["input_ids"][-1]] *= 2  # so that some texts end
    model.tie_weights()
    kind.finish(model, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _eva_shapes(sizes: PartSizes) -> dict[str, tuple[int, ...]]:
    width, patch, side = sizes.vision_width("eva"), sizes.patch_size, sizes.image_size // sizes.patch_size
    inner = sizes.vision_inner or 2 * width + 1
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, side * side + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for index in range(sizes.vision_blocks):
        block = f"blocks.{index}"
        shapes |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
        shapes |= {f"{block}.attn.qkv.weight": (3 * width, width)}
        shapes |= {f"{block}.attn.q_bias": (width,), f"{block}.attn.v_bias": (width,)}
        shapes |= _linear(f"{block}.attn.proj", width, width)
        shapes |= _linear(f"{block}.mlp.fc1", inner, width) | _linear(f"{block}.mlp.fc2", width, inner)
    return shapes | _norm("norm", width) | _linear("head", 32, width)


def _clip_shapes(sizes: PartSizes) -> dict[str, tuple[int, ...]]:
    width, patch, side = sizes.vision_width("clip"), sizes.patch_size, sizes.image_size // sizes.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (width,),
        "positional_embedding": (side * side + 1, width),
        "conv1.weight": (width, 3, patch, patch),
        "proj": (width, 32),
    }
    for index in range(sizes.vision_blocks):
        block = f"transformer.resblocks.{index}"
        shapes |= _norm(f"{block}.ln_1", width) | _norm(f"{block}.ln_2", width)
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= _linear(f"{block}.attn.out_proj", width, width)
        shapes |= _linear(f"{block}.mlp.c_fc", 4 * width, width) | _linear(f"{block}.mlp.c_proj", width, 4 * width)
    return shapes | _norm("ln_pre", width) | _norm("ln_post", width)


def _attention(name: str, width: int, read: int) -> dict[str, tuple[int, ...]]:
    shapes = _linear(f"{name}.self.query", width, width) | _linear(f"{name}.output.dense", width, width)
    shapes |= _linear(f"{name}.self.key", width, read) | _linear(f"{name}.self.value", width, read)
    return shapes | _norm(f"{name}.output.LayerNorm", width)


def _linear(name: str, out: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {name: _draw(name, shape, generator) for name, shape in sorted(shapes.items())}


def _draw(name: str, shape: tuple[int, ...], generator: Any) -> Tensor:
    import torch

    noise = torch.randn(shape, generator=generator)
    is_norm = "norm" in name.lower() or ".ln_" in name or name.startswith("ln_")
    if is_norm and name.endswith("weight"):
        return 1 + 0.1 * noise
    if name.endswith(("token", "tokens", "embedding", "embeddings.weight")) or "embed_" in name:
        return noise * (0.1 if "patch" in name else 0.3)
    if len(shape) < 2:
        return 0.1 * noise
    if len(shape) == 4:
        return 0.1 * noise
    return 2 * noise * shape[1] ** -0.5
