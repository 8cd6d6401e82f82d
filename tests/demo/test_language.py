"""What language models are pre-trained on, and what they start from."""

import numpy as np
import pytest
import torch
from blipstream_demo import language, scenes
from blipstream_demo.text import spelled_out
from tokenizers import pre_tokenizers

PLACED = {"llama": language.LLAMA, "t5": language.T5}


def test_an_object_in_place_is_one_slot_of_its_third():
    tokenizer = language.T5.build_tokenizer()
    describe, rng = language.Describer(tokenizer, placed=True), np.random.default_rng(0)
    batch = [scenes.scene("train", i) for i in range(40)]
    for scene, slots in zip(batch, describe(batch, rng).tolist(), strict=True):
        used = [(place, tokenizer.decode(words)) for place, words in enumerate(slots) if words[0] >= 0]
        assert [place // (language.QUERIES // 3) for place, _ in used] == list(range(len(scene.things)))
        assert [words for _, words in used] == [" ".join(triple) for triple in scene.triples]


def test_strewn_words_keep_the_order_of_objects():
    tokenizer = language.OPT.build_tokenizer()
    describe, rng = language.Describer(tokenizer, placed=False), np.random.default_rng(0)
    batch = [scenes.scene("train", i) for i in range(40)]
    for scene, slots in zip(batch, describe(batch, rng).tolist(), strict=True):
        words = [tokenizer.decode(word).strip() for slot in slots for word in slot if word >= 0]
        found = [sorted(words[i : i + 3]) for i in range(0, len(words), 3)]
        assert found == [sorted(triple) for triple in scene.triples]


def test_a_plain_description_is_the_scenes_words():
    tokenizer = language.OPT.build_tokenizer()
    scene = scenes.scene("train", 3)
    slots = language.Describer(tokenizer, placed=False)([scene], np.random.default_rng(0), plain=True)
    words = [tokenizer.decode(int(word)).strip() for word in slots[0, :, 0] if word >= 0]
    assert words == [word for triple in scene.triples for word in triple]


def test_a_tokenizer_that_splits_words_is_refused():
    wordless = language.T5.build_tokenizer()
    wordless.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    with pytest.raises(ValueError, match="splits words of the world"):
        language.Describer(wordless, placed=True)


@pytest.mark.parametrize("name", PLACED)
def test_tokens_attend_to_their_like_at_first(name):
    torch.manual_seed(0)
    kind = PLACED[name]
    model = language.build(kind.build_config(kind.build_tokenizer()))
    language.attend_by_likeness(model, 5.0)
    tokens = torch.nn.functional.normalize(torch.randn(40, 128), dim=1) * 128**0.5
    if name == "llama":
        attention = model.model.layers[1].self_attn
        query, key, count, factor = attention.q_proj, attention.k_proj, 32, 32**-0.5
    else:
        attention = model.encoder.block[1].layer[0].SelfAttention
        query, key, count, factor = attention.q, attention.k, 32, 1.0
    with torch.no_grad():
        scores = factor * query(tokens)[:, :count] @ key(tokens)[:, :count].T
    assert scores.diagonal().mean() == pytest.approx(5.0, abs=1.0)
    others = scores[~torch.eye(40, dtype=torch.bool)]
    assert others.mean().abs() < 0.5
    assert others.std() < 1.5


def test_slots_without_words_are_told_apart_where_there_are_no_positions():
    kind = language.LLAMA
    model = language.build(kind.build_config(kind.build_tokenizer()))
    empty = torch.full((1, language.QUERIES, 3), -1)
    embeds = language.description_embeds(model, empty, noisy=False)[0]
    assert torch.pdist(embeds).min() > 0.2 * embeds.norm(dim=1).mean()
    opt = language.build(language.OPT.build_config(language.OPT.build_tokenizer()))
    assert not language.description_embeds(opt, empty, noisy=False).any()


def test_two_heads_look_to_the_neighbours_at_first():
    kind = language.T5
    model = language.build(kind.build_config(kind.build_tokenizer()))
    attention = model.encoder.block[0].layer[0].SelfAttention
    before = attention.compute_bias(6, 6)[0].detach()
    language.attend_to_neighbours(model, 4.0)
    gained = attention.compute_bias(6, 6)[0].detach() - before
    assert not gained[:2].any()
    back, ahead = gained[2:]
    torch.testing.assert_close(back.diagonal(-1), torch.full((5,), 6.0))
    torch.testing.assert_close(back.diagonal(-3), torch.full((3,), 2.0))
    assert not back.triu(1).any()
    torch.testing.assert_close(ahead.diagonal(1), torch.full((5,), 6.0))
    torch.testing.assert_close(ahead.diagonal(3), torch.full((3,), 2.0))
    assert not ahead.tril().any()


def test_a_lesson_asks_more_of_what_is_hard_and_less_of_what_is_easy():
    scene = next(s for s in (scenes.scene("train", i) for i in range(50)) if len(s.things) == 3)
    plain = language.OPT.lessons[0].texts(scene, np.random.default_rng(0))
    first, second, third = (lesson.texts(scene, np.random.default_rng(0)) for lesson in language.T5.lessons)
    for lesson, counts in ((plain, (1, 1, 0)), (first, (4, 4, 2)), (second, (1, 6, 2)), (third, (1, 7, 1))):
        kinds = [text.kind for text in lesson]
        assert tuple(map(kinds.count, ("existence", "relation", "spelled out"))) == counts
    easy = [text for text in second if text.kind in ("colour", "shape", "size", "count")]
    assert len(easy) < 4


def test_a_relation_is_spelled_out_truly():
    question = scenes.Question("relation", "Is the green star on the left of the blue square?", "no")
    text = spelled_out(question)
    assert text.prompt == "Question: Is the green star on the left of the blue square? Long answer:"
    assert text.target == "the green star is to the right of the blue square"
