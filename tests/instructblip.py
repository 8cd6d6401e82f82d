"""Random tiny InstructBLIP checkpoints, in the manner of :mod:`tests.checkpoints`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.checkpoints import TinySizes, draw_weights, qformer_config, vision_config
from tests.languages import CORPUS, opt_config, opt_tokenizer

if TYPE_CHECKING:
    from transformers import (
        BertTokenizerFast,
        InstructBlipForConditionalGeneration,
        InstructBlipProcessor,
        PreTrainedTokenizerFast,
    )

QFORMER_VOCAB_SIZE = 150
QFORMER_POSITIONS = 40
"""Tokens of an instruction at most."""


def make_qformer_tokenizer(vocab_size: int = QFORMER_VOCAB_SIZE) -> BertTokenizerFast:
    """A WordPiece tokenizer in the manner of BERT's: ``[CLS]`` before a text, ``[SEP]`` behind it, lower case."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertTokenizerFast

    word_piece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    word_piece.normalizer = normalizers.BertNormalizer(lowercase=True)
    word_piece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
    )
    word_piece.train_from_iterator(CORPUS, trainer)
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


def make_instructblip_opt(
    tokenizer_size: int = 320,
    image_token_id: int = 319,
    *,
    seed: int = 0,
    sizes: TinySizes | None = None,
    opt: Mapping[str, Any] | None = None,
    qformer: Mapping[str, Any] | None = None,
) -> InstructBlipForConditionalGeneration:
    """An InstructBLIP with an OPT language model, drawn from ``seed``.

    ``opt`` and ``qformer`` override fields of the language model's and the Q-Former's configurations.
    """
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

    sizes = sizes or TinySizes()
    instruction = {"vocab_size": QFORMER_VOCAB_SIZE, "max_position_embeddings": QFORMER_POSITIONS}
    config = InstructBlipConfig(
        vision_config=vision_config(sizes),
        qformer_config={**qformer_config(sizes), **instruction, **(qformer or {})},
        text_config=opt_config(tokenizer_size, opt),
        num_query_tokens=sizes.num_query_tokens,
        image_token_index=image_token_id,
    )
    return draw_weights(InstructBlipForConditionalGeneration(config), seed)


def save_instructblip_opt(folder: Path, **options: Any) -> Path:
    """Write a random InstructBLIP with OPT (weights, configurations, processor) into ``folder``, and return it."""
    tokenizer, sizes = opt_tokenizer(), options.get("sizes") or TinySizes()
    model = make_instructblip_opt(len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"), **options)
    model.save_pretrained(folder)
    make_instructblip_processor(tokenizer, make_qformer_tokenizer(), sizes).save_pretrained(folder)
    return folder
