"""Random tiny InstructBLIP checkpoints, in the manner of :mod:`tests.support.checkpoints`."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.checkpoints import TinySizes, draw_weights, qformer_config, vision_config
from tests.support.languages import CORPUS, LANGUAGES

if TYPE_CHECKING:
    from transformers import (
        BertTokenizerFast,
        InstructBlipForConditionalGeneration,
        InstructBlipProcessor,
        InstructBlipVideoForConditionalGeneration,
        PreTrainedTokenizerFast,
    )

QFORMER_VOCAB_SIZE = 150
QFORMER_POSITIONS = 40
"""Tokens of an instruction at most."""
QFORMER_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Ids 0 to 4."""


def make_qformer_tokenizer() -> BertTokenizerFast:
    """A WordPiece tokenizer in the manner of BERT's: ``[CLS]`` before a text, ``[SEP]`` behind it, lower case.

    Its vocabulary is spelled out: trained twice, WordPiece gives two vocabularies.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    words = sorted({word for text in CORPUS for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    letters = string.ascii_lowercase + string.digits
    pieces = [*QFORMER_SPECIAL_TOKENS, *words, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(pieces))}
    word_piece = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    word_piece.normalizer = normalizers.BertNormalizer(lowercase=True)
    word_piece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    word_piece.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return BertTokenizerFast(tokenizer_object=word_piece)


def make_instructblip_processor(
    tokenizer: PreTrainedTokenizerFast, qformer_tokenizer: BertTokenizerFast, sizes: TinySizes
) -> InstructBlipProcessor:
    """A processor with a tokenizer for the language model and one for the Q-Former."""
    from transformers import BlipImageProcessor, InstructBlipProcessor

    size = {"height": sizes.image_size, "width": sizes.image_size}
    images = BlipImageProcessor(size=size)
    return InstructBlipProcessor(images, tokenizer, qformer_tokenizer, num_query_tokens=sizes.num_query_tokens)


def make_instructblip(
    language: str = "opt",
    tokenizer_size: int = 320,
    image_token_id: int = 319,
    *,
    seed: int = 0,
    sizes: TinySizes | None = None,
    text: Mapping[str, Any] | None = None,
    qformer: Mapping[str, Any] | None = None,
) -> InstructBlipForConditionalGeneration:
    """An InstructBLIP with a language model of that kind, drawn from ``seed``.

    ``text`` and ``qformer`` override fields of the language model's and the Q-Former's configurations.
    """
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

    sections = _sections(language, tokenizer_size, sizes or TinySizes(), text, qformer)
    config = InstructBlipConfig(**sections, image_token_index=image_token_id)
    return draw_weights(InstructBlipForConditionalGeneration(config), seed)


def make_instructblipvideo(
    language: str = "opt",
    tokenizer_size: int = 320,
    video_token_id: int = 319,
    *,
    seed: int = 0,
    sizes: TinySizes | None = None,
    text: Mapping[str, Any] | None = None,
) -> InstructBlipVideoForConditionalGeneration:
    """An InstructBlipVideo, which reads four frames, like :func:`make_instructblip`."""
    from transformers import InstructBlipVideoConfig, InstructBlipVideoForConditionalGeneration

    sections = _sections(language, tokenizer_size, sizes or TinySizes(), text, None)
    config = InstructBlipVideoConfig(**sections, video_token_index=video_token_id)
    return draw_weights(InstructBlipVideoForConditionalGeneration(config), seed)


def save_instructblip(folder: Path, language: str = "opt", **options: Any) -> Path:
    """Write a random InstructBLIP (weights, configurations, processor) into ``folder``, and return it.

    ``options`` are those of :func:`make_instructblip`.
    """
    tokenizer, sizes = LANGUAGES[language].tokenizer(), options.get("sizes") or TinySizes()
    model = make_instructblip(language, len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"), **options)
    model.save_pretrained(folder)
    make_instructblip_processor(tokenizer, make_qformer_tokenizer(), sizes).save_pretrained(folder)
    return folder


def save_instructblipvideo(folder: Path, language: str = "opt", **options: Any) -> Path:
    """Write a random InstructBlipVideo into ``folder``, and return it; ``options`` go to its making.

    Its processor is written by hand: transformers makes none without torchvision.
    """
    tokenizer, sizes = LANGUAGES[language].tokenizer(image_token=False), options.get("sizes") or TinySizes()
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    model = make_instructblipvideo(language, len(tokenizer), tokenizer.convert_tokens_to_ids("<video>"), **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_qformer_tokenizer().save_pretrained(folder / "qformer_tokenizer")
    video_processor = {
        "video_processor_type": "InstructBlipVideoVideoProcessor",
        "size": {"height": sizes.image_size, "width": sizes.image_size},
        "resample": 3,
        "do_sample_frames": False,
    }
    processor = {
        "processor_class": "InstructBlipVideoProcessor",
        "num_query_tokens": sizes.num_query_tokens,
        "video_processor": video_processor,
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def _sections(
    language: str,
    tokenizer_size: int,
    sizes: TinySizes,
    text: Mapping[str, Any] | None,
    qformer: Mapping[str, Any] | None,
) -> dict[str, Any]:
    instruction = {"vocab_size": QFORMER_VOCAB_SIZE, "max_position_embeddings": QFORMER_POSITIONS}
    return {
        "vision_config": vision_config(sizes),
        "qformer_config": {**qformer_config(sizes), **instruction, **(qformer or {})},
        "text_config": LANGUAGES[language].config(tokenizer_size, text),
        "num_query_tokens": sizes.num_query_tokens,
    }
