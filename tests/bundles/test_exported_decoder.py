"""Exported graphs behind the decode loop, token for token against ``generate`` of transformers."""

from __future__ import annotations

from typing import Any

import pytest

from blipstream.contract import (
    BLIP2,
    GRAPH_FILE,
    MODEL_VERSION,
    PIXEL_VALUES,
    QFORMER,
    SOFT_TOKENS,
    TOKENIZER_FILE,
    VISION_ENCODER,
)
from blipstream.decoding.loop import DecodeLoop, LoopConfig
from blipstream.decoding.request import Chunk, GenerationRequest, Prompt, SamplingParams
from blipstream.decoding.text import Tokenizer
from blipstream.engines import create_engine, load_decoder
from blipstream.manifest import Manifest
from tests.support.checkpoints import PROMPTS, make_images
from tests.support.variants import VARIANTS, variant_bundle, variant_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow


class Served:
    """A checkpoint in transformers, and its bundle's decoder behind a loop."""

    def __init__(self, language: str) -> None:
        checkpoint, bundle = variant_checkpoint(language), variant_bundle(language)
        self.model = transformers.Blip2ForConditionalGeneration.from_pretrained(checkpoint).eval()
        self.processor = transformers.Blip2Processor.from_pretrained(checkpoint)
        self.manifest = Manifest.load(bundle)
        version = bundle / BLIP2 / MODEL_VERSION
        self.tokenizer = Tokenizer.load(version / TOKENIZER_FILE)
        self.decoder = load_decoder(
            self.manifest.decoder, lambda file: create_engine(self.manifest.engine, version / file, threads=1)
        )
        self.pixels = self.processor.image_processor(make_images(4), return_tensors="pt")["pixel_values"]
        features = {PIXEL_VALUES.name: self.pixels.numpy()}
        for model in (VISION_ENCODER, QFORMER):
            with create_engine(self.manifest.engine, bundle / model / MODEL_VERSION / GRAPH_FILE, threads=1) as stage:
                features = stage.run(features)
        self.soft_tokens = features[SOFT_TOKENS.name]  # (images, Q, D)

    def expected(self, image: int, prompt: str, **options: Any) -> list[int]:
        """New tokens of ``generate``; an empty prompt is left to its own default."""
        text = {"input_ids": self.input_ids(prompt)} if prompt else {}
        with torch.no_grad():
            output = self.model.generate(
                self.pixels[image : image + 1], **text, **options, output_logits=True, return_dict_in_generate=True
            )
        return output.sequences[0, -len(output.logits) :].tolist()

    def input_ids(self, prompt: str) -> Any:
        image_token_id = self.manifest.generation.image_token_id
        placeholders = [image_token_id] * self.manifest.qformer.num_query_tokens
        return torch.tensor([[*placeholders, *self.prompt_ids(prompt)]])

    def prompt_ids(self, prompt: str) -> tuple[int, ...]:
        return self.tokenizer.encode(prompt) if prompt else self.manifest.generation.empty_prompt_ids

    def serve(self, cases: list[tuple[int, str, SamplingParams]]) -> list[tuple[list[int], str]]:
        """Tokens and text of each case, all of them submitted at once to three slots."""
        loop = DecodeLoop(
            self.decoder,
            self.tokenizer,
            eos_token_ids=self.manifest.generation.eos_token_ids,
            image_token_id=self.manifest.generation.image_token_id,
            config=LoopConfig(prefill_budget=40),
        )
        answers: list[list[Chunk]] = [[] for _ in cases]
        for (image, prompt, params), chunks in zip(cases, answers, strict=True):
            prompt_tokens = Prompt(self.soft_tokens[image], self.prompt_ids(prompt))
            loop.submit(GenerationRequest("", prompt_tokens, params, chunks.append))
        while loop.step():
            loop.check_integrity()
        assert all(chunks[-1].error is None for chunks in answers)
        return [
            ([token for chunk in chunks for token in chunk.token_ids], "".join(chunk.text for chunk in chunks))
            for chunks in answers
        ]


@pytest.fixture(scope="module", params=VARIANTS)
def served(request: pytest.FixtureRequest) -> Served:
    return Served(request.param)


@pytest.mark.parametrize(
    ("params", "options"),
    [
        ({}, {}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"min_tokens": 12}, {"min_new_tokens": 12}),
        ({"bad_words": ("a", "cat", "the")}, {"bad_words_ids": "a cat the"}),
    ],
)
def test_greedy_tokens_and_text_are_those_of_generate(served, params, options):
    if "bad_words_ids" in options:
        words = served.tokenizer.word_sequences(options["bad_words_ids"].split())
        options = {"bad_words_ids": [list(word) for word in words]}
    questions = [(image, prompt) for image in range(4) for prompt in PROMPTS]
    cases = [(*question, SamplingParams(max_tokens=20, **params)) for question in questions]
    expected = [served.expected(*question, max_new_tokens=20, do_sample=False, **options) for question in questions]
    assert len({tuple(tokens) for tokens in expected}) > len(questions) // 2  # the model says different things
    found = served.serve(cases)
    assert [tokens for tokens, _ in found] == expected
    assert [text for _, text in found] == served.processor.batch_decode(expected, skip_special_tokens=True)


def test_samples_do_not_depend_on_their_neighbours(served):
    params = SamplingParams(max_tokens=20, temperature=1.1, top_p=0.95, top_k=40, seed=7)
    alone = served.serve([(1, PROMPTS[2], params)])
    crowd = [(image, prompt, SamplingParams(max_tokens=5 + image)) for image in range(4) for prompt in PROMPTS]
    together = served.serve([*crowd[:5], (1, PROMPTS[2], params), *crowd[5:]])
    assert together[5] == alone[0]
