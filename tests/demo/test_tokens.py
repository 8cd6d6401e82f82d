"""The tokenizers keep what their families' tokenizers promise: ids of special tokens, templates, texts come back."""

import numpy as np
import pytest
from blipstream_demo import language, scenes, text, tokens

KINDS = {"opt": language.OPT, "llama": language.LLAMA, "t5": language.T5}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param].build_tokenizer()


def test_texts_come_back(tokenizer):
    for whole in text.corpus(50):
        assert tokenizer.decode(tokenizer(whole).input_ids, skip_special_tokens=True) == whole


def test_image_tokens_have_the_last_id(tokenizer):
    ids = tokenizer(tokens.IMAGE_TOKEN * 3, add_special_tokens=False).input_ids
    assert ids == [len(tokenizer) - 1] * 3


def test_words_of_the_world_are_whole(tokenizer):
    words = (*scenes.SIZES, *scenes.COLOURS, *scenes.SHAPES)
    assert len({tuple(tokenizer(" " + word, add_special_tokens=False).input_ids) for word in words}) == len(words)
    assert all(len(tokenizer(" " + word, add_special_tokens=False).input_ids) == 1 for word in words)


def test_a_prompt_begins_its_text(tokenizer):
    """For decoder-only models; T5's prompts and answers are apart."""
    if tokenizer.padding_side == "left":
        for example in text.scene_texts(scenes.scene("train", 0), 0, np.random.default_rng(0)):
            prompt = tokenizer(example.prompt).input_ids
            assert tokenizer(example.whole).input_ids[: len(prompt)] == prompt


def test_building_again_gives_the_same(tokenizer):
    again = {len(kind.build_tokenizer()): kind.build_tokenizer() for kind in KINDS.values()}[len(tokenizer)]
    assert again.get_vocab() == tokenizer.get_vocab()


def test_templates_and_special_ids():
    llama, t5 = tokens.build_llama_tokenizer(), tokens.build_t5_tokenizer()
    assert llama.convert_ids_to_tokens(llama("a star").input_ids) == ["<s>", "▁a", "▁star"]
    assert (llama.bos_token, llama.eos_token, llama.pad_token) == ("<s>", "</s>", "<pad>")
    assert t5.convert_ids_to_tokens(t5("a star").input_ids) == ["▁a", "▁star", "</s>"]
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id, t5.bos_token_id) == (0, 1, 2, None)


def test_unknown_characters():
    """LLaMA's tokenizer spells them in bytes, T5's has one token for them."""
    llama, t5 = tokens.build_llama_tokenizer(), tokens.build_t5_tokenizer()
    assert llama.decode(llama("fünf").input_ids, skip_special_tokens=True) == "fünf"
    assert t5.unk_token_id in t5("fünf").input_ids
    assert t5.unk_token_id not in t5("five zebras").input_ids
