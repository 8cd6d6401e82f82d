"""What training computes is what the library's classes compute."""

import numpy as np
import pytest
import torch
from blipstream_demo import (
    checkpoint,
    data,
    language,
    pipeline,
    qformer,
    reading,
    scenes,
    stage_one,
    text,
    tokens,
    vision,
)
from blipstream_demo.stage_one import itg_mask
from PIL import Image
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2Processor,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
)

QUERIES = 16
BRANCHES = {branch.folder: branch for branch in (pipeline.FIRST, *pipeline.OTHERS)}
CLASSES = {
    "checkpoint": (Blip2ForConditionalGeneration, Blip2Processor),
    "checkpoint-t5": (Blip2ForConditionalGeneration, Blip2Processor),
    "checkpoint-instruct": (InstructBlipForConditionalGeneration, InstructBlipProcessor),
}


@pytest.fixture(scope="module")
def opt_tokenizer():
    return tokens.build_opt_tokenizer()


@pytest.fixture(scope="module")
def wordpiece():
    return tokens.build_wordpiece_tokenizer()


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
def twos(one):
    """The second stage of each branch, with random weights."""
    torch.manual_seed(0)
    stages = {}
    for folder, branch in BRANCHES.items():
        language_model = language.build(branch.language.build_config(branch.language.build_tokenizer()))
        stage = pipeline.assemble(branch, one.model.vision_model, language_model, one).eval()
        torch.nn.init.normal_(stage.model.language_projection.weight, std=0.1)  # so that the image matters
        stages[folder] = stage
    return stages


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


@pytest.mark.parametrize("folder", BRANCHES)
@torch.no_grad()
def test_training_predicts_what_the_librarys_model_predicts(twos, shown, pixels, folder):
    """Of each text alone, from its image and prompt; the prompts padded, as ``generate`` meets them in a batch."""
    stage, rng = twos[folder], np.random.default_rng(0)
    rows = [text.scene_texts(scene, 0, rng) for scene in shown]
    image = stage.model.vision_model(pixel_values=pixels).last_hidden_state
    found = stage.predict(image, stage.pack(rows))
    texts = [one_text for row in rows for one_text in row]
    owners = [row for row, row_texts in enumerate(rows) for _ in row_texts]
    logits, labels = expected_predictions(stage, [shown[row] for row in owners], texts)
    assert len(found.labels) == sum(map(len, labels))
    for number in range(len(texts)):
        mine = found.texts == number
        assert found.labels[mine].tolist() == labels[number]
        torch.testing.assert_close(found.logits[mine], logits[number], atol=1e-4, rtol=1e-4)


def expected_predictions(stage, owners, texts):
    """Logits (T, V) and labels (T) for each text, from the model's forward pass as the library documents it."""
    tokenizer, model = stage.tokenizer, stage.model
    instructed = isinstance(model, InstructBlipForConditionalGeneration)
    parts = (checkpoint.image_processor(), tokenizer, *([stage.wordpiece] if instructed else []))
    processor = (InstructBlipProcessor if instructed else Blip2Processor)(*parts, num_query_tokens=QUERIES)
    prompts = [one_text.prompt for one_text in texts]
    images = [scenes.render(scene) for scene in owners]
    inputs = dict(processor(images=images, text=prompts, padding=True, return_tensors="pt"))
    if instructed:  # the processor pads both tokenizers' texts on the left, where the Q-Former's positions begin
        prompted = stage.wordpiece(prompts, padding=True, return_tensors="pt")
        inputs |= {f"qformer_{name}": prompted[name] for name in ("input_ids", "attention_mask")}
    if model.language_model.config.is_encoder_decoder:
        targets = tokenizer([one_text.target for one_text in texts]).input_ids
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in targets], True, -100)
        logits = model(**inputs, labels=padded).logits
        return [row[: len(ids)] for row, ids in zip(logits, targets, strict=True)], targets
    wholes = [tokenizer(one_text.whole).input_ids for one_text in texts]
    known = [len(tokenizer(prompt).input_ids) for prompt in prompts]
    whole = processor(images=images, text=[one_text.whole for one_text in texts], padding=True, return_tensors="pt")
    inputs |= {name: whole[name] for name in ("input_ids", "attention_mask")}
    # a model without learnt positions would count padding as positions: ``generate`` counts what is there
    if model.config.text_config.model_type != "opt":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**inputs).logits
    predicted = [logits[i, -(len(ids) - known[i] + 1) :] for i, ids in enumerate(wholes)]
    return predicted, [[*ids[known[i] :], tokenizer.eos_token_id] for i, ids in enumerate(wholes)]


def test_packing_predicts_the_answer_and_the_end_only(opt_tokenizer):
    packed = reading.PackedReader(opt_tokenizer, 2).pack([[QUESTION]])
    predicted = packed.labels[0][packed.labels[0] != -100].tolist()
    assert opt_tokenizer.convert_ids_to_tokens(predicted) == ["Ġsmall", "</s>"]
    assert packed.positions[0].tolist() == list(range(2 + packed.ids.shape[1]))


QUESTION = text.Text("size", "Question: How big is the star? Answer:", "small")


def test_pairs_give_the_prompt_to_the_encoder_and_the_answer_to_the_decoder():
    tokenizer = tokens.build_t5_tokenizer()
    caption = text.Text("caption", "", "a small red star")
    answers, captions = reading.PairReader(tokenizer, start=0).pack([[caption, QUESTION], [QUESTION]])
    assert answers.rows.tolist() == [0, 1]
    assert answers.texts.tolist() == [1, 2]
    assert tokenizer.decode(answers.ids[0]) == "Question: How big is the star? Answer:</s>"
    assert tokenizer.convert_ids_to_tokens(answers.labels[0].tolist()) == ["▁small", "</s>"]
    assert tokenizer.convert_ids_to_tokens(answers.given[0].tolist()) == ["<pad>", "▁small"]
    assert tokenizer.decode(captions.ids[0]) == "</s>"
    assert tokenizer.decode(captions.labels[0]) == "a small red star</s>"


def test_a_text_is_right_if_its_every_token_is():
    logits = torch.eye(4)[[1, 2, 3, 0]]
    found = reading.Predictions(logits, torch.tensor([1, 0, 3, 0]), torch.tensor([0, 0, 1, 2]))
    assert found.right().tolist() == [False, True, True]


def test_a_second_stage_needs_layers_that_look_where_its_own_look(twos, one):
    """The first stage's Q-Former could not fill in cross-attention that it has not."""
    stage = twos["checkpoint-t5"]
    bare = checkpoint.retrieval_model(vision.config(), 200, QUERIES)
    del bare.qformer.encoder.layer[0].crossattention
    with pytest.raises(ValueError, match=r"has no encoder\.layer\.0\.crossattention"):
        stage.start_from(bare, (0, 1, 3))


def test_a_second_stage_takes_over_the_chosen_layers(one, twos):
    stage = twos["checkpoint-instruct"]
    found = stage.model.qformer.encoder.layer[2].crossattention.attention.query.weight
    assert torch.equal(found, one.model.qformer.encoder.layer[3].crossattention.attention.query.weight)
    words = stage.model.qformer.embeddings.word_embeddings.weight
    assert torch.equal(words, one.model.embeddings.word_embeddings.weight)
    assert not stage.model.qformer.encoder.layer[1].has_cross_attention


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory, one, twos):
    folder = tmp_path_factory.mktemp("demo")
    for name, stage in twos.items():
        pipeline.save(stage, folder / name)
    checkpoint.save_retrieval(one.model, one.tokenizer, folder / "checkpoint-retrieval", checkpoint.SHARED_VISION)
    return folder


@pytest.mark.parametrize("folder", [*BRANCHES, "checkpoint-retrieval"])
def test_the_checkpoints_load_and_share_the_vision_encoder(saved, one, twos, folder, caplog):
    model = twos[folder].model if folder in twos else one.model
    loaded = type(model).from_pretrained(saved / folder)
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name
    shards = {path.name for path in (saved / folder).glob("*.safetensors")}
    assert len(shards) == (2 if folder == "checkpoint" else 1)
    assert not caplog.records


@pytest.mark.parametrize("folder", BRANCHES)
def test_the_checkpoints_caption_from_an_image_alone(saved, shown, folder):
    model_class, processor_class = CLASSES[folder]
    model = model_class.from_pretrained(saved / folder)
    processor = processor_class.from_pretrained(saved / folder)
    assert processor.tokenizer.is_fast
    inputs = processor(images=scenes.render(shown[0]), text="", return_tensors="pt")
    begin = model.config.text_config.bos_token_id
    assert inputs["input_ids"].tolist() == [[model.config.image_token_index] * QUERIES + [begin]]
    assert model.generation_config.max_new_tokens == 32
    expected = model.generate(**inputs, max_new_tokens=3)
    alone = {name: value for name, value in inputs.items() if "pixel" in name or "qformer" in name}
    assert torch.equal(model.generate(**alone, max_new_tokens=3), expected)


def test_preprocessing_is_the_processors(shown):
    image = scenes.render(shown[0])
    found = checkpoint.image_processor()(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(found, vision.pixel_values(np.array(image)[None]))
    large = checkpoint.image_processor()(Image.new("RGB", (300, 200)), return_tensors="pt")["pixel_values"]
    assert large.shape == (1, 3, 96, 96)
