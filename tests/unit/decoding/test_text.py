"""Incremental decoding against the whole text at once, and stop strings."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blipstream.decoding.text import TextStream, Tokenizer
from blipstream.errors import BundleError, InvalidRequestError
from tests.unit.decoding.fakes import EOS, byte_tokenizer

CORPUS = [
    "a large red circle and a small blue square",
    "how many objects? two, I think. don't you?",
    "Frühstück für zwei: 早餐 🍳🥐, naïve café — ½ price",
    "👩‍👩‍👧 family\n\n  indented   text",
]


@functools.cache
def byte_level_backend() -> tokenizers.Tokenizer:
    """BPE on bytes, as OPT's: a token may end in the middle of a character."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["</s>", "<pad>", "<image>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@functools.cache
def metaspace_backend() -> tokenizers.Tokenizer:
    """Pieces with a visible space and bytes as a last resort, as LLaMA's and T5's: the first space is not text."""
    pieces = [
        "<s>",
        "</s>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁a",
        "▁red",
        "▁",
        "c",
        "ir",
        "cle",
        "▁ca",
        "fé",
    ]
    backend = tokenizers.Tokenizer(
        tokenizers.models.Unigram([(piece, -float(rank)) for rank, piece in enumerate(pieces)], 2, byte_fallback=True)
    )
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


@functools.cache
def reference_tokenizer(backend: tokenizers.Tokenizer):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def reference(backend: tokenizers.Tokenizer, ids: list[int]) -> str:
    """What the processor's ``decode`` makes of the tokens in transformers."""
    return reference_tokenizer(backend).decode(ids, skip_special_tokens=True)


def stream(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """The pieces released for each token and at the end, and whether a stop string ended the text."""
    text = TextStream(tokenizer, stop)
    pieces = [text.push(token) for token in ids]
    return [*pieces, text.flush()], text.stopped


# --- incremental decoding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", CORPUS)
def test_text_comes_back(text):
    tokenizer = Tokenizer(byte_level_backend())
    pieces, _ = stream(tokenizer, list(tokenizer.encode(text)))
    assert "".join(pieces) == text
    assert pieces[-1] == ""  # nothing was held back for longer than needed


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 329), max_size=40))
@example([0])
@example([3 + 0xE2, 3 + 0x82])
def test_any_tokens_give_the_text_of_transformers(ids):
    backend = byte_level_backend()
    pieces, _ = stream(Tokenizer(backend), ids)
    assert "".join(pieces) == reference(backend, ids)


byte_runs = st.one_of(st.text(max_size=4).map(str.encode), st.sampled_from([b"\xc3", b"\xf0\x9f"]))
piece_runs = st.lists(st.integers(259, 266), min_size=1, max_size=3).flatmap(
    lambda pieces: st.permutations([*pieces[1:], 0, 1]).map(lambda rest: [pieces[0], *rest])
)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(byte_runs, piece_runs), max_size=6))
@example([(b"", [0, 259, 260])])
@example([(b"", [259, 0, 260])])
@example([(b"", [1, 1, 261, 262]), (b"\xc3", [259])])
def test_pieces_with_a_visible_space(runs):
    backend = metaspace_backend()
    ids = [token for run, pieces in runs for token in (*(3 + byte for byte in run), *pieces)]
    pieces, _ = stream(Tokenizer(backend), ids)
    assert "".join(pieces) == reference(backend, ids)


def test_half_a_character_is_held_back():
    tokenizer = byte_tokenizer()
    pieces, _ = stream(tokenizer, [0x61, *"é🍳".encode(), 0x62])
    assert pieces == ["a", "", "é", "", "", "", "🍳", "b", ""]


def test_a_character_that_never_completes_is_released_at_the_end():
    pieces, _ = stream(byte_tokenizer(), [0x61, 0xC3])
    assert pieces == ["a", "", "\N{REPLACEMENT CHARACTER}"]


def test_special_tokens_are_no_text():
    assert stream(byte_tokenizer(), [0x61, EOS, 0x62, EOS])[0] == ["a", "", "b", "", ""]


# --- stop strings ----------------------------------------------------------------------------------------------------


def stop_of(text: str, *stop: str) -> tuple[str, bool]:
    pieces, stopped = stream(byte_tokenizer(), list(text.encode()), stop)
    return "".join(pieces), stopped


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stopped"),
    [
        ("red circle", (" circle",), "red", True),
        ("red circle", ("square",), "red circle", False),
        ("red circ", ("circle",), "red circ", False),  # only begun: it is text after all
        ("aaab", ("aab",), "a", True),
        ("abcabd", ("abd",), "abc", True),
        ("one\ntwo", ("\n",), "one", True),
        ("stop", ("stop",), "", True),
        ("abcd", ("bc", "abcd"), "a", True),  # the one that is complete first
        ("xbc", ("c", "bc"), "x", True),  # both at once: the longer
        ("für", ("ü",), "f", True),
    ],
)
def test_stop_strings(text, stop, expected, stopped):
    assert stop_of(text, *stop) == (expected, stopped)


def test_text_that_may_begin_a_stop_string_is_held_back():
    pieces, stopped = stream(byte_tokenizer(), list(b"a##b###c"), ("###",))
    assert pieces == ["a", "", "", "##b", "", "", "", "", ""]
    assert stopped


def test_nothing_follows_a_stop_string():
    text = TextStream(byte_tokenizer(), ("x",))
    assert [text.push(byte) for byte in b"axbx"] == ["a", "", "", ""]
    assert text.flush() == ""


def test_a_stop_string_in_what_the_end_releases():
    text = TextStream(byte_tokenizer(), ("\N{REPLACEMENT CHARACTER}",))
    assert [text.push(byte) for byte in (0x61, 0xC3)] == ["a", ""]
    assert text.flush() == ""
    assert text.stopped


@settings(deadline=None)
@given(
    st.text("ab#é", max_size=20),
    st.lists(st.text("ab#é", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=20, max_size=20),
)
@example("#abaé", ["b", "aba"], [5] * 20)
def test_the_text_does_not_depend_on_its_cut_into_tokens(text, stop, sizes):
    """Text in pieces of any sizes is cut where text in single characters is: before the first complete stop string."""
    expected = text
    for end in range(len(text) + 1):
        complete = [word for word in stop if text[:end].endswith(word)]
        if complete:
            expected = text[: end - max(map(len, complete))]
            break
    filtered = TextStream(byte_tokenizer(), stop)
    pieces, rest = [], text
    for size in sizes:
        pieces.append(filtered._release(rest[:size]))
        rest = rest[size:]
    assert "".join(pieces) + filtered.flush() == expected


# --- encoding --------------------------------------------------------------------------------------------------------


def test_words_are_spelt_with_and_without_a_space():
    tokenizer = byte_tokenizer()
    assert tokenizer.word_sequences(["ab", "c"]) == [(97, 98), (32, 97, 98), (99,), (32, 99)]


def test_padding_and_truncation_of_the_file_are_ignored(tmp_path: Path):
    backend = tokenizers.Tokenizer.from_str(byte_level_backend().to_str())
    backend.enable_padding(length=50)
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("a large red circle")) == "a large red circle"


def test_special_tokens_are_added_when_wanted():
    backend = tokenizers.Tokenizer.from_str(byte_level_backend().to_str())
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 0)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("a") == (0, *tokenizer.encode("a", special_tokens=False))


def wordpiece_backend() -> tokenizers.Tokenizer:
    """As the Q-Former's (BERT's): punctuation is cut off."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", "sep", "mask", "a"]
    model = tokenizers.models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    backend.add_special_tokens(words[:4])
    return backend


@pytest.mark.parametrize(
    ("make_backend", "text"),
    [
        (byte_level_backend, "a</s> b"),
        (byte_level_backend, "<image>"),
        (byte_level_backend, "<pad><pad>"),
        (wordpiece_backend, "a [SEP] [MASK]"),
    ],
)
def test_a_text_that_spells_a_special_token_is_plain_text(make_backend, text):
    backend = tokenizers.Tokenizer.from_str(make_backend().to_str())
    special = set(backend.get_added_tokens_decoder())
    assert special & set(backend.encode(text, add_special_tokens=False).ids)
    assert not special & set(Tokenizer(backend).encode(text, special_tokens=False))


@pytest.mark.parametrize("text", ["a</s>", "<s>"])
def test_a_special_token_among_the_pieces_of_a_unigram_model_is_refused(text):
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(metaspace_backend().to_str()))
    with pytest.raises(InvalidRequestError, match=r"the text must not contain '<.*>', which is a special token of th"):
        tokenizer.encode(text)


@pytest.mark.parametrize("text", [*CORPUS, "a < b > c", "[a] sep mask", "  \r\n\t", "שלום \0 مرحبا"])
@pytest.mark.parametrize("make_backend", [byte_level_backend, metaspace_backend, wordpiece_backend])
def test_any_other_text_has_the_ids_of_the_file(make_backend, text):
    backend = tokenizers.Tokenizer.from_str(make_backend().to_str())
    expected = tuple(backend.encode(text).ids)
    assert Tokenizer(backend).encode(text) == expected


def test_an_unknown_character_is_no_fault():
    assert Tokenizer(wordpiece_backend()).encode("a é北") == (1, 8, 0, 0, 2)


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(BundleError, match=r"there is no tokenizer at .*tokenizer.json"):
        Tokenizer.load(path)
    path.write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer.json is not a tokenizer: "):
        Tokenizer.load(path)
