"""What training computes is what the library's classes compute."""

import numpy as np
import pytest
import torch
from blipstream_demo import checkpoint, data, language, qformer, scenes, stage_one, stage_two, text, vision
from blipstream_demo.stage_one import itg_mask
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, Blip2Processor

QUERIES = 16


@pytest.fixture(scope="module")
def opt_tokenizer():
    return text.build_opt_tokenizer()


@pytest.fixture(scope="module")
def wordpiece():
    return text.build_wordpiece_tokenizer()


@pytest.fixture(scope="module")
def shown():
    return [scenes.scene("val", i) for i in range(6)]


@pytest.fixture(scope="module")
def pixels(shown):
    return vision.pixel_values(np.stack([np.array(scenes.render(scene)) for scene in shown]))


@pytest.fixture(scope="module")
def one(wordpiece):
    torch.manual_seed(0)
    return stage_one.StageOne(checkpoint.retrieval_model(vision.config(), len(wordpiece), QUERIES).eval(), wordpiece)


@pytest.fixture(scope="module")
def two(opt_tokenizer, one):
    torch.manual_seed(0)
    model = checkpoint.generation_model(vision.config(), language.config(opt_tokenizer), opt_tokenizer, QUERIES)
    stage = stage_two.StageTwo(model.eval())
    stage.start_from(one.model)
    torch.nn.init.normal_(model.language_projection.weight, std=0.1)  # so that the image matters
    return stage


@torch.no_grad()
def test_contrast_and_matching_are_the_librarys(one, shown, pixels, wordpiece):
    things = np.stack([data.encode(scene) for scene in shown])
    texts = stage_one.captions_of(things, wordpiece)
    inputs = {"pixel_values": pixels, "input_ids": texts.ids, "attention_mask": texts.present.long()}
    image = one.model.vision_model(pixel_values=pixels).last_hidden_state
    keys_values = qformer.image_keys_values(one.model.qformer, image)
    features, _ = one.itc_and_itg(keys_values, texts)
    found = one.similarities(features, one.text_features(texts))
    torch.testing.assert_close(found, one.model(**inputs).logits_per_image)
    expected = one.model(**inputs, use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(one.match(keys_values, texts.ids, texts.present), expected)


@torch.no_grad()
def test_packed_texts_have_the_logits_of_single_ones(two, shown, pixels, opt_tokenizer):
    """Left padding included, as ``generate`` meets it in a batch."""
    rng = np.random.default_rng(0)
    texts = [text.scene_texts(scene, 0, rng) for scene in shown]
    packer = text.Packer(opt_tokenizer, QUERIES)
    image = two.model.vision_model(pixel_values=pixels).last_hidden_state
    logits = language.packed_logits(two.model.language_model, two.soft_tokens(image), packer.pack(texts))
    processor = Blip2Processor(checkpoint.image_processor(), opt_tokenizer, num_query_tokens=QUERIES)
    for row, scene in enumerate(shown):
        start = 0
        wholes = [one_text.whole for one_text in texts[row]]
        inputs = processor(images=[scenes.render(scene)] * len(wholes), text=wholes, padding=True, return_tensors="pt")
        expected = two.model(**inputs).logits
        for whole, single in zip(wholes, expected, strict=True):
            length = len(packer.encode(whole))
            torch.testing.assert_close(logits[row, start : start + length], single[-length:], atol=1e-4, rtol=1e-4)
            start += length


def test_packing_predicts_the_answer_and_the_end_only(opt_tokenizer):
    packer = text.Packer(opt_tokenizer, 2)
    packed = packer.pack([[text.Text("colour", "Question: How big is the star? Answer:", "small")]])
    predicted = packed.labels[0][packed.labels[0] != -100].tolist()
    assert opt_tokenizer.convert_ids_to_tokens(predicted) == ["Ġsmall", "</s>"]
    assert packed.positions[0].tolist() == list(range(2 + packed.ids.shape[1]))


def test_generation_mask():
    mask = itg_mask(2, 3)[0, 0].int().tolist()
    assert mask == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_negatives_are_never_of_the_same_caption(one, wordpiece):
    """With two captions in turn, every negative of a caption is of the other one."""
    torch.manual_seed(0)
    codes = np.stack([data.encode(scenes.scene("val", i % 2)) for i in range(8)])
    texts = stage_one.captions_of(codes, wordpiece)
    drawn = []
    match = one.match
    one.match = lambda keys_values, ids, present: drawn.append(ids) or match(keys_values, ids, present)
    try:
        one.losses(torch.randn(8, 65, 192), texts, hardness=1.0)
    finally:
        del one.match
    (ids,) = drawn
    for i in range(8):
        assert torch.equal(ids[i], texts.ids[i])
        assert torch.equal(ids[8 + i], texts.ids[(i + 1) % 2])


def test_hardness_rises_after_a_warm_up():
    assert [stage_one.hardness(done) for done in (0, 0.1, 0.15)] == [0, 0, 0]
    assert 0 < stage_one.hardness(0.3) < 1
    assert stage_one.hardness(0.5) == stage_one.hardness(0.9) == 1


def test_patches_know_their_object_and_its_middle():
    labels = np.zeros((1, 24, 24), np.uint8)
    labels[0, 3:9, 12:18] = 2
    things = np.full((1, data.PLACES, 3), data.NONE, np.uint8)
    things[0, :2] = [[0, 1, 2], [1, 3, 4]]
    place, attributes = vision.patch_labels(labels, things, 8)
    assert place.view(8, 8).nonzero().tolist() == [[1, 4], [1, 5], [2, 4], [2, 5]]
    assert set(place[place > 0].tolist()) == {2}
    assert attributes[0, 12].tolist() == [1, 3, 4]
    offsets = vision.centre_offsets(labels, place.numpy())[0].view(8, 8, 2)
    middle = torch.tensor([14.5 / 24, 5.5 / 24])
    torch.testing.assert_close(offsets[1, 4], middle - torch.tensor([4.5, 1.5]) / 8)


def test_the_checkpoints_load_and_share_the_vision_encoder(tmp_path, one, two, opt_tokenizer, wordpiece, shown):
    two.model.vision_model.load_state_dict(one.model.vision_model.state_dict())
    checkpoint.save_generation(two.model, opt_tokenizer, tmp_path / "checkpoint")
    shared = f"../checkpoint/{checkpoint.VISION_SHARD}"
    checkpoint.save_retrieval(one.model, wordpiece, tmp_path / "checkpoint-retrieval", shared)
    generation = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
    retrieval = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "checkpoint-retrieval")
    for loaded, saved in ((generation, two.model), (retrieval, one.model)):
        assert {value.dtype for value in loaded.parameters()} == {torch.float32}
        for name, value in saved.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value.half().float()), name
    assert len(list((tmp_path / "checkpoint-retrieval").glob("*.safetensors"))) == 1
    processor = Blip2Processor.from_pretrained(tmp_path / "checkpoint")
    inputs = processor(images=scenes.render(shown[0]), text="", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[generation.config.image_token_index] * QUERIES + [2]]
    assert generation.generate(**inputs, max_new_tokens=3).shape[1] <= QUERIES + 1 + 3
    assert generation.generation_config.max_new_tokens == 32


def test_preprocessing_is_the_processors(shown):
    image = scenes.render(shown[0])
    found = checkpoint.image_processor()(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(found, vision.pixel_values(np.array(image)[None]))
    large = checkpoint.image_processor()(Image.new("RGB", (300, 200)), return_tensors="pt")["pixel_values"]
    assert large.shape == (1, 3, 96, 96)
