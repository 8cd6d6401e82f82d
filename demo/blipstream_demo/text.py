"""The texts of a scene, and the two tokenizers: byte-level BPE for OPT, WordPiece for the Q-Former's text side."""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from . import scenes

IMAGE_TOKEN = "<image>"
DECODE_TOKEN = "[DEC]"
"""Takes the place of [CLS] where the Q-Former generates (ITG), as in the original code."""
CAPTION_PROMPTS = ("", "a picture of")
_QUESTION_PROMPTS = ("Question: {} Answer:", "Question: {} Short answer:")


@dataclass(frozen=True)
class Text:
    """What the language model is given (may be empty) and what it is to go on with."""

    kind: str
    prompt: str
    target: str

    @property
    def whole(self) -> str:
        return f"{self.prompt} {self.target}" if self.prompt else self.target


def scene_texts(scene: scenes.Scene, variant: int, rng: np.random.Generator) -> list[Text]:
    """The caption and one question of each kind, in the prompts that the model is to know."""
    prompt = CAPTION_PROMPTS[int(rng.random() < 0.2)]
    texts = [Text("caption", prompt, scenes.caption(scene))]
    for question in scenes.questions(scene, variant):
        form = _QUESTION_PROMPTS[int(rng.random() < 0.2)]
        texts.append(Text(question.kind, form.format(question.text), question.answer))
    return texts


def _corpus(count: int = 3000) -> list[str]:
    rng = np.random.default_rng(0)
    return [text.whole for i in range(count) for text in scene_texts(scenes.scene("train", i), 0, rng)] + [
        prompt for prompt in CAPTION_PROMPTS if prompt
    ]


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
    bpe.train_from_iterator(_corpus(), trainer)
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
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def build_wordpiece_tokenizer() -> BertTokenizerFast:
    """WordPiece over the words of the world, and over single letters for any others."""
    words: dict[str, None] = {}
    for text in _corpus():
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


@dataclass(frozen=True)
class Packed:
    """Texts behind a prefix: token ids (B, L), labels (B, L) with -100 where nothing is predicted, positions
    (B, prefix + L), and the attention mask (B, 1, prefix + L, prefix + L), True where a query (second last axis) sees
    a key."""

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor


class Packer:
    """Packs several texts of one scene behind one prefix, so that the prefix is computed once.

    Every text sees the prefix and itself; its positions go on from the prefix, as they do for a text of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prefix: int) -> None:
        self.prefix = prefix
        self._tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}
        self.pad, self.end = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """Token ids with the begin token, remembered."""
        if text not in self._ids:
            self._ids[text] = self._tokenizer(text).input_ids
        return self._ids[text]

    def pack(self, rows: list[list[Text]]) -> Packed:
        encoded = [[self._one(text) for text in row] for row in rows]
        length = max(sum(len(ids) for ids, _ in row) for row in encoded)
        shape = (len(rows), length)
        ids, labels = np.full(shape, self.pad), np.full(shape, -100)
        positions, owners = np.zeros(shape, np.int64), np.full(shape, -1)
        for i, row in enumerate(encoded):
            start = 0
            for owner, (tokens, known) in enumerate(row):
                stop = start + len(tokens)
                ids[i, start:stop] = tokens
                labels[i, start + known - 1 : stop] = [*tokens[known:], self.end]
                positions[i, start:stop] = self.prefix + np.arange(len(tokens))
                owners[i, start:stop] = owner
                start = stop
        mask = self._mask(owners)
        before = np.broadcast_to(np.arange(self.prefix), (len(rows), self.prefix))
        all_positions = np.concatenate([before, positions], 1)
        return Packed(*(torch.from_numpy(array) for array in (ids, labels, all_positions, mask)))

    def _one(self, text: Text) -> tuple[list[int], int]:
        """Token ids without the end token, and how many of them are given rather than predicted."""
        known = len(self.encode(text.prompt))
        return self.encode(text.whole), known

    def _mask(self, owners: np.ndarray) -> np.ndarray:
        count, length = owners.shape
        total = self.prefix + length
        mask = np.zeros((count, 1, total, total), bool)
        mask[:, 0, :, : self.prefix] = True
        same = owners[:, :, None] == owners[:, None, :]
        mask[:, 0, self.prefix :, self.prefix :] = same
        return mask & np.tri(total, dtype=bool)
