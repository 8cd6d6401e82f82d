"""The options of ``blipstream build``: what each is called, takes and means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blipstream.manifest import EngineName, HardwareLevel

_LAVIS = "A checkpoint in LAVIS's layout"
_TENSORRT = "TensorRT"

Output = Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="The folder that becomes the bundle.")]
CheckpointName = Annotated[
    str | None,
    typer.Argument(metavar="CHECKPOINT", help="A folder, or a hub id, in the Hugging Face layout.", show_default=False),
]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="REVISION",
        help="Branch, tag or commit of a hub id; owner/name@revision says the same.",
        show_default="the hub's main branch",
    ),
]
Engine = Annotated[
    EngineName,
    typer.Option(help="What runs the graphs: ONNX Runtime on the CPU or on a GPU, or TensorRT on this machine's GPU."),
]
Precision = Annotated[
    str,
    typer.Option(
        metavar="PRECISION",
        help="fp32, fp16, bf16, int8 (TensorRT: fp8) for all stages, or one for each: "
        "vision_encoder=int8,decoder=int4; a stage that is not named is fp32.",
    ),
]
MaxBatch = Annotated[int, typer.Option(min=1, help="Images that are read at once.")]
MaxSequences = Annotated[int, typer.Option(min=1, help="Sequences that decode at once.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default="256, or what the model reads if less",
        help="Tokens of one sequence: soft tokens, prompt and answer; behind an encoder (T5), of each of the two.",
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Images like those that will be served, for int8 and fp8; by default a few synthetic ones.",
        show_default=False,
    ),
]
TestSet = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.jsonl",
        help="Questions with their answers: the report says how many the bundle gets right.",
        show_default=False,
    ),
]
QuestionTemplate = Annotated[
    str | None,
    typer.Option(
        metavar="TEMPLATE",
        help="What clients put a question into, in place of {}, unless they have their own.",
        show_default="'Question: {} Answer:'; '{}' for InstructBLIP",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")]
NoPlugins = Annotated[
    bool,
    typer.Option("--no-plugins", help="Without Blipstream's kernel in the Q-Former.", rich_help_panel=_TENSORRT),
]
DebugParity = Annotated[
    bool,
    typer.Option(
        "--debug-parity",
        help="Compare each engine with ONNX Runtime tensor by tensor, into layers.json.",
        rich_help_panel=_TENSORRT,
    ),
]
VersionCompatible = Annotated[
    bool,
    typer.Option("--version-compatible", help="Engines that later versions load too.", rich_help_panel=_TENSORRT),
]
Hardware = Annotated[
    HardwareLevel,
    typer.Option(
        help="Which GPUs load the engines besides this kind: none, those of the same compute capability, or all "
        "from Ampere on.",
        rich_help_panel=_TENSORRT,
    ),
]
TimingCache = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Where the timings of kernels are kept from build to build.",
        show_default="in the user's cache folder",
        rich_help_panel=_TENSORRT,
    ),
]
LavisTrained = Annotated[
    Path | None,
    typer.Option(metavar="QFORMER.pth", help="The trained part, in place of CHECKPOINT.", rich_help_panel=_LAVIS),
]
LavisVision = Annotated[
    Path | None,
    typer.Option(metavar="VIT.pth", help="Its ViT: eva_vit_g, or CLIP ViT-L/14.", rich_help_panel=_LAVIS),
]
LavisLanguage = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Its language model, in the Hugging Face layout.", rich_help_panel=_LAVIS),
]
LavisTokenizer = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="BERT's tokenizer, where it is an InstructBLIP.", rich_help_panel=_LAVIS),
]
LavisVisionLayers = Annotated[
    int | None,
    typer.Option(min=1, help="Blocks of the ViT to keep.", show_default="as LAVIS keeps them", rich_help_panel=_LAVIS),
]
LavisImageSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Pixels of an image's side.",
        show_default="as the ViT's position embeddings",
        rich_help_panel=_LAVIS,
    ),
]
