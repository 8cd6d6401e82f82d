"""The processor of a checkpoint, as transformers has it: image transform, tokenizers, and placeholders of soft tokens.

Images are always resized by Pillow, as servers do it (``BlipImageProcessorPil``). Where torchvision is installed,
transformers prefers a form that resizes by torchvision, whose pixels differ by up to 2e-3.

Where the checkpoint is for videos, frames are images of one processor: ``InstructBlipVideoProcessor`` makes the same
ids with another placeholder, as often for each frame, but its video processor needs torchvision.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from blipstream.errors import CheckpointError
from blipstream_export.faults import faults_of
from blipstream_export.files import check_readable, read_json

if TYPE_CHECKING:
    from blipstream_export.families import ImageSide

_QFORMER_TOKENIZER = "qformer_tokenizer"
_PROCESSOR_FILE = "processor_config.json"

FILES = {
    "tokenizer": ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt"),
    "image processor": (_PROCESSOR_FILE, "preprocessor_config.json"),
    "video processor": (_PROCESSOR_FILE, "video_preprocessor_config.json", "preprocessor_config.json"),
    "tokenizer of the Q-Former": (f"{_QFORMER_TOKENIZER}/tokenizer.json", f"{_QFORMER_TOKENIZER}/vocab.txt"),
}
"""Files by their kind; a folder needs one of each kind that is asked of it."""


def load_processor(folder: Path, side: ImageSide) -> Any:
    """The processor of a checkpoint's folder, of the class that its image side names.

    Raises:
        CheckpointError: a tokenizer or the image processor is missing or damaged.
    """
    import transformers

    check_files(folder, *_needed(side))
    whole = (folder / "tokenizer.json").is_file()
    unconverted = "" if whole else " (it has no tokenizer.json: making one needs sentencepiece or tiktoken)"
    with faults_of(f"the tokenizer and image processor of {folder}{unconverted}"):
        if side.num_frames > 1:
            processor = _frames_processor(folder, side)
        else:
            processor = getattr(transformers, side.processor).from_pretrained(folder, local_files_only=True)
            images: Any = transformers.AutoImageProcessor
            processor.image_processor = images.from_pretrained(folder, local_files_only=True, backend="pil")
    if side.instructed:  # transformers takes the language model's where this one cannot be read
        own = folder / _QFORMER_TOKENIZER
        with faults_of(f"the tokenizer of the Q-Former in {own}"):
            processor.qformer_tokenizer = transformers.AutoTokenizer.from_pretrained(own, local_files_only=True)
    return processor


def frame(processor: Any, config: Any, side: ImageSide, folder: Path) -> None:
    """Agree on the placeholder of soft tokens and on their number; old checkpoints leave both to the code.

    Afterwards the processor puts as many placeholders before a prompt as an image, or all frames together, have soft
    tokens, and none where the language model has no row for the placeholder.

    Raises:
        CheckpointError: processor and configuration contradict each other.
    """
    declared = processor.num_query_tokens
    if declared is not None and declared != config.num_query_tokens:
        raise CheckpointError(
            f"the processor of {folder} declares num_query_tokens = {declared}, but the tensor query_tokens holds "
            f"{config.num_query_tokens}"
        )
    if getattr(config, side.placeholder_field) is None:
        setattr(config, side.placeholder_field, _placeholder_id(processor, config, side))
    framed = getattr(config, side.placeholder_field) is not None
    processor.num_query_tokens = config.num_query_tokens * side.num_frames if framed else None


def _needed(side: ImageSide) -> list[str]:
    """Kinds of files without which a checkpoint of this image side is not whole."""
    images = "image processor" if side.num_frames == 1 else "video processor"
    return ["tokenizer", images, *(["tokenizer of the Q-Former"] if side.instructed else [])]


def check_files(folder: Path, *kinds: str) -> None:
    """See that files of these kinds are there: transformers would make up what they should say.

    Args:
        folder: a checkpoint's, or a language model's.
        kinds: keys of :data:`FILES`.

    Raises:
        CheckpointError: a kind of which the folder holds none, or a Git LFS pointer in place of a file.
    """
    for kind in kinds:
        found = [folder / name for name in FILES[kind] if (folder / name).is_file()]
        for path in found:
            check_readable(path)
        if kind == "image processor":  # older checkpoints have it in the other file
            found = [path for path in found if path.name != _PROCESSOR_FILE or "image_processor" in read_json(path)]
        if not found:
            raise CheckpointError(f"the checkpoint {folder} holds no {kind}: expected one of {', '.join(FILES[kind])}")


def _placeholder_id(processor: Any, config: Any, side: ImageSide) -> int | None:
    """The placeholder's id for a configuration that names none, if the language model has a row for it."""
    token = processor.tokenizer.convert_tokens_to_ids(side.placeholder)
    known = isinstance(token, int) and token != processor.tokenizer.unk_token_id
    return token if known and token < config.text_config.vocab_size else None


def _frames_processor(folder: Path, side: ImageSide) -> Any:
    import transformers
    from tokenizers import AddedToken

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.image_token = AddedToken(side.placeholder, normalized=False, special=True)  # where it looks for one
    tokenizer.add_tokens([tokenizer.image_token], special_tokens=True)
    fields = _frame_transform(folder)
    images = transformers.BlipImageProcessorPil.from_dict(fields)
    declared = read_json(folder / _PROCESSOR_FILE) if (folder / _PROCESSOR_FILE).is_file() else {}
    return getattr(transformers, side.processor)(
        images, tokenizer, tokenizer, num_query_tokens=declared.get("num_query_tokens")
    )


def _frame_transform(folder: Path) -> dict[str, Any]:
    """How a frame becomes ``pixel_values``: fields of a video processor that image processors share."""
    for name in FILES["video processor"]:
        if (folder / name).is_file():
            fields = read_json(folder / name)
            fields = fields.get("video_processor", fields) if name == _PROCESSOR_FILE else fields
            if "size" in fields:
                return {key: fields[key] for key in _TRANSFORM if key in fields}
    raise CheckpointError(
        f"the checkpoint {folder} does not say how a frame is resized, in {', '.join(FILES['video processor'])}"
    )


_TRANSFORM = (
    "size",
    "resample",
    "rescale_factor",
    "image_mean",
    "image_std",
    "do_resize",
    "do_rescale",
    "do_normalize",
    "do_convert_rgb",
    "do_center_crop",
    "do_pad",
)
