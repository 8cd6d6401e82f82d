"""Small language models of each kind for :mod:`tests.support.checkpoints`: tokenizers, sizes, variants.

Each tokenizer is in the manner of the kind's own: what it puts around a text, how it marks spaces, what it does with
characters that it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

CORPUS = (
    "a photo of a red cat and a blue dog on a green chair",
    "Question: what colour is the large circle? Answer: yellow",
    "Question: how many children are there? Answer: two children and a dog",
    "this is a photo of the small house, the tree and the river",
)

OPT_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
"""Ids 0 to 3, as in OPT's own tokenizer; ``</s>`` begins and ends a text."""

LLAMA_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
"""Ids 0 to 2, as in LLaMA's own tokenizer; the bytes follow."""

T5_SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
"""Ids 0 to 2, as in T5's own tokenizer; ``</s>`` ends a text, and nothing begins it."""

_BYTES = range(len(LLAMA_SPECIAL_TOKENS), len(LLAMA_SPECIAL_TOKENS) + 256)
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

Overrides = Mapping[str, Any]

OPT_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd heads": {"hidden_size": 60, "num_attention_heads": 5, "num_hidden_layers": 3, "ffn_dim": 77},
    "one head, one layer": {"hidden_size": 9, "num_attention_heads": 1, "num_hidden_layers": 1, "ffn_dim": 31},
    "post-norm, narrow embeddings": {"do_layer_norm_before": False, "word_embed_proj_dim": 20},
    "pre-norm, narrow embeddings": {"word_embed_proj_dim": 28, "hidden_size": 64, "num_attention_heads": 4},
    "post-norm": {"do_layer_norm_before": False, "num_hidden_layers": 3},
    "no bias": {"enable_bias": False},
    "plain norms": {"layer_norm_elementwise_affine": False},
    "no final norm": {"_remove_final_layer_norm": True},
    "untied, larger vocabulary": {"tie_word_embeddings": False, "vocab_size": 337},
    "gelu": {"activation_function": "gelu", "hidden_size": 40, "num_attention_heads": 2},
}
"""Overrides of ``OPTConfig``: every branch of the architecture, with odd sizes (heads of 12, 9, 20, ... values)."""

LLAMA_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped heads, biased": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "one key head, biased attention": {"num_key_value_heads": 1, "attention_bias": True, "num_hidden_layers": 3},
    "heads wider than the hidden state, tied": {"head_dim": 22, "hidden_size": 36, "tie_word_embeddings": True},
    "heads of 2, one layer": {"hidden_size": 6, "num_attention_heads": 3, "num_hidden_layers": 1, "mlp_bias": True},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}},
    "llama3 scaling": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 24,
        },
        "num_key_value_heads": 2,
    },
    "yarn scaling": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 40,
        },
    },
    "relu, larger vocabulary": {"hidden_act": "relu", "vocab_size": 371, "intermediate_size": 31},
}
"""Overrides of ``LlamaConfig``; heads of 12, 22, 2 values, whose halves are padded."""

T5_VARIANTS: dict[str, dict[str, Any]] = {
    "gated, untied": {},
    "ungated, tied": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "ungated, untied, one layer": {"feed_forward_proj": "relu", "num_layers": 1, "d_ff": 31},
    "gated, tied, gelu": {"dense_act_fn": "gelu", "tie_word_embeddings": True, "num_heads": 5},
    "gated by silu, even heads": {"feed_forward_proj": "gated-silu", "d_kv": 16, "num_heads": 2},
    "few buckets": {"relative_attention_num_buckets": 6, "relative_attention_max_distance": 9},
    "a shallower decoder": {"num_layers": 3, "num_decoder_layers": 1, "d_kv": 5},
    "a deeper decoder": {"num_layers": 1, "num_decoder_layers": 3, "d_model": 20},
}
"""Overrides of ``T5Config``; heads of 7, 5 or 16 values, together never as wide as the hidden state of 48 or 20."""


def opt_tokenizer(vocab_size: int = 320, *, image_token: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in the manner of OPT's: ``</s>`` before a text, ``<image>`` as the last id.

    It holds at most ``vocab_size`` tokens (260 are the bytes and the special tokens).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - int(image_token),
        special_tokens=list(OPT_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return _wrap(bpe, image_token, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def llama_tokenizer(vocab_size: int = 340, *, image_token: bool = True) -> PreTrainedTokenizerFast:
    """A BPE tokenizer in the manner of LLaMA's: ``<s>`` before a text, unknown characters as bytes, no padding token.

    It holds at most ``vocab_size`` tokens (259 are the bytes and the special tokens).
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE)
    size = vocab_size - len(LLAMA_SPECIAL_TOKENS) - len(_BYTES) - int(image_token)
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    tokens = [*LLAMA_SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [tuple(merge) for merge in learned["merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrap(bpe, image_token, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def t5_tokenizer(*, image_token: bool = True) -> PreTrainedTokenizerFast:
    """A unigram tokenizer in the manner of T5's: ``</s>`` behind a text, and nothing before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = sorted({_SPACE + word for text in CORPUS for word in text.split()})
    letters = sorted({_SPACE, *"".join(CORPUS).replace(" ", "")})
    scores = [(token, 0.0) for token in T5_SPECIAL_TOKENS]
    scores += [(word, -4.0) for word in words] + [(letter, -6.0) for letter in letters]
    unigram = Tokenizer(models.Unigram(scores, unk_id=2))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE)
    unigram.decoder = decoders.Metaspace(_SPACE)
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _wrap(unigram, image_token, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def opt_config(vocab_size: int, overrides: Overrides | None = None) -> dict[str, Any]:
    """A small OPT that ends a text as OPT's own tokenizer does."""
    from transformers import OPTConfig

    fields = {
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "ffn_dim": 80,
        "max_position_embeddings": 160,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    return OPTConfig(**(fields | dict(overrides or {}))).to_dict()


def llama_config(vocab_size: int, overrides: Overrides | None = None) -> dict[str, Any]:
    """A small LLaMA; four heads of 12 values."""
    from transformers import LlamaConfig

    fields = {
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 70,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 160,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**(fields | dict(overrides or {}))).to_dict()


def t5_config(vocab_size: int, overrides: Overrides | None = None) -> dict[str, Any]:
    """A small T5 like Flan-T5 in BLIP-2, whose configuration has a ``bos_token_id``; three heads of 7 values."""
    from transformers import T5Config

    fields = {
        "vocab_size": vocab_size,
        "d_model": 48,
        "d_kv": 7,
        "d_ff": 70,
        "num_layers": 2,
        "num_heads": 3,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    }
    return T5Config(**(fields | dict(overrides or {}))).to_dict()


def _leave(model: Any, seed: int) -> None:
    """Change nothing."""


@dataclass(frozen=True)
class Language:
    """A kind of language model."""

    tokenizer: Callable[..., PreTrainedTokenizerFast]
    config: Callable[[int, Overrides | None], dict[str, Any]]
    finish: Callable[[Any, int], None] = _leave
    """Is called with the language model and a seed when the weights are drawn."""


def _hush_bytes(model: Any, seed: int) -> None:
    """Let a LLaMA not generate bytes: drawn at random, they would make no characters."""
    import torch

    del seed
    with torch.no_grad():
        model.lm_head.weight[_BYTES.start : _BYTES.stop] = 0


def _untie(model: Any, seed: int) -> None:
    """Give a T5 a head of its own where its logits are not scaled: transformers ties it at construction always."""
    import torch

    if not model.config.scale_decoder_outputs:
        noise = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(seed))
        model.lm_head.weight = torch.nn.Parameter(noise)


LANGUAGES = {
    "opt": Language(opt_tokenizer, opt_config),
    "llama": Language(llama_tokenizer, llama_config, _hush_bytes),
    "t5": Language(t5_tokenizer, t5_config, _untie),
}
"""By ``model_type``."""


def _wrap(backend: Tokenizer, image_token: bool, **special_tokens: str) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)
    if image_token:
        tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer
