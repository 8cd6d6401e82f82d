"""The tokenizers: byte-level BPE for OPT, BPE with byte fallback for LLaMA, Unigram for T5, WordPiece for the
Q-Former's text side. Each has the form that the family's own tokenizers have, and a vocabulary of this world."""

from __future__ import annotations

import json
import math
import string
from collections import Counter

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from .text import corpus

IMAGE_TOKEN = "<image>"
DECODE_TOKEN = "[DEC]"
"""Takes the place of [CLS] where the Q-Former generates (ITG), as in the original code."""
_SPACE = "\u2581"
_MAX_LENGTH = 128


def build_opt_tokenizer(vocabulary: int = 448) -> PreTrainedTokenizerFast:
    """Byte-level BPE as OPT has it: ``</s>`` begins (by template) and ends a text, padding on the left.

    ``<image>`` has the last id. The vocabulary is at most ``vocabulary``, 256 bytes included.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(), trainer)
    bpe.add_special_tokens([IMAGE_TOKEN])
    bpe.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A $B", special_tokens=[("</s>", bpe.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_wordpiece_tokenizer() -> BertTokenizerFast:
    """WordPiece over the words of the world, and over single letters for any others."""
    words: dict[str, None] = {}
    for text in corpus():
        for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text.lower()):
            words[word] = None
    letters = string.ascii_lowercase + string.digits
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", DECODE_TOKEN]
    tokens = dict.fromkeys([*special, *sorted(words), *letters, *(f"##{letter}" for letter in letters)])
    tokens.update(dict.fromkeys(string.punctuation))
    tokenizer = BertTokenizerFast(
        vocab={token: i for i, token in enumerate(tokens)}, do_lower_case=True, model_max_length=64
    )
    tokenizer.add_special_tokens({"bos_token": DECODE_TOKEN})
    return tokenizer


def build_llama_tokenizer(merges: int = 160) -> PreTrainedTokenizerFast:
    """BPE over characters as LLaMA has it: bytes for unknown characters, ``<s>`` begins a text (by template), padding
    on the left. ``<image>`` has the last id."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    learner = Tokenizer(models.BPE())
    spaces = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="first")
    learner.pre_tokenizer = spaces
    alphabet = [_SPACE, *_printable()]
    learner.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, show_progress=False),
    )
    learnt = learner.get_vocab()
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(learnt, key=lambda token: learnt[token])]
    pairs = [tuple(pair) for pair in _merges(learner)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.pre_tokenizer = spaces
    bpe.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens([*special, IMAGE_TOKEN])
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return _fast(bpe, bos_token="<s>", padding_side="left")


def build_t5_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram as T5 has it: ``<pad>`` is 0 and starts what is generated, ``</s>`` is 1 and ends every text (by
    template), padding on the right. The pieces are the words of the world and single characters; ``<image>`` has the
    last id."""
    spaces = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always"),
            pre_tokenizers.Punctuation(),
        ]
    )
    counts = Counter(piece for text in corpus() for piece, _ in spaces.pre_tokenize_str(text))
    total = counts.total()
    # a word is to be likelier than any way to spell it
    letters = dict.fromkeys([_SPACE, *_printable()], -2 * math.log(total))
    scores = letters | {piece: math.log(count / total) for piece, count in sorted(counts.items())}
    special = ["<pad>", "</s>", "<unk>"]
    unigram = Tokenizer(models.Unigram([*((token, 0.0) for token in special), *scores.items()], unk_id=2))
    unigram.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always"),
        ]
    )
    unigram.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    unigram.add_special_tokens([*special, IMAGE_TOKEN])
    unigram.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return _fast(unigram, padding_side="right")


def _printable() -> list[str]:
    """The printable characters of ASCII, without the space."""
    return sorted(string.ascii_letters + string.digits + string.punctuation)


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    return json.loads(tokenizer.to_str())["model"]["merges"]


def _fast(tokenizer: Tokenizer, padding_side: str, bos_token: str | None = None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos_token,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side=padding_side,
        model_max_length=_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
