"""Measures the stored checkpoints with the library's own classes on test scenes, and fills in the model card.

Greedy ``generate`` in fp32, prompts in left-padded batches. Retrieval is among the first 500 test scenes whose captions
differ.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
)

from . import samples, scenes

GENERATION = {
    "checkpoint": "BLIP-2, OPT",
    "checkpoint-t5": "BLIP-2, T5",
    "checkpoint-instruct": "InstructBLIP, LLaMA",
}
"""The folders of the generation checkpoints, and what the model card calls them."""
RETRIEVAL = "checkpoint-retrieval"
CHECKPOINTS = (*GENERATION, RETRIEVAL)
POOL = 500
RERANKED = 16
_BATCH = 50
Figures = dict[str, Any]


def main(demo: Path, count: int, chosen: Sequence[str] = CHECKPOINTS) -> None:
    """Write ``evaluation.json``, the tables of ``README.md`` and the sample images in ``demo``.

    Only the ``chosen`` checkpoints are measured; the figures of the others stay as they are in ``evaluation.json``.
    """
    path = demo / "evaluation.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    if set(chosen) != set(CHECKPOINTS) and figures.get("scenes") != count:
        raise ValueError(f"{path} is not about {count} scenes; measure all checkpoints")
    figures["scenes"] = count
    shown = scenes.test_scenes(count)
    images = [scenes.render(scene) for scene in tqdm(shown, "render")]
    for name in chosen:
        if name == RETRIEVAL:
            figures["retrieval"] = retrieval(demo / name, *distinct(shown, images))
        else:
            found = generation(Generator(demo / name), shown, images)
            figures.setdefault("generation", {})[name] = found
    samples.write(demo / "images")
    path.write_text(json.dumps(figures, indent=1) + "\n")
    fill_card(demo / "README.md", figures)
    print(table(figures))


# --- captions and answers -------------------------------------------------------------------------------------------


class Generator:
    """A generation checkpoint as a function from images and prompts to texts."""

    def __init__(self, folder: Path) -> None:
        model, processor = _CLASSES[json.loads((folder / "config.json").read_text())["model_type"]]
        self._model = model.from_pretrained(folder).eval()
        self._processor = processor.from_pretrained(folder)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        inputs = self._processor(images=list(images), text=list(prompts), padding=True, return_tensors="pt")
        if "qformer_input_ids" in inputs:
            # the processor pads the Q-Former's prompts on the left, as the language model's: its positions would shift
            prompted = self._processor.qformer_tokenizer(list(prompts), padding=True, return_tensors="pt")
            inputs.update({f"qformer_{name}": prompted[name] for name in ("input_ids", "attention_mask")})
        tokens = self._model.generate(**inputs, do_sample=False, max_new_tokens=32)
        if self._model.config.use_decoder_only_language_model:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]  # the prompt comes back as well
        return [text.strip() for text in self._processor.batch_decode(tokens, skip_special_tokens=True)]


_CLASSES: dict[str, tuple[Any, Any]] = {
    "blip-2": (Blip2ForConditionalGeneration, Blip2Processor),
    "instructblip": (InstructBlipForConditionalGeneration, InstructBlipProcessor),
}


def generation(
    generate: Callable[[Sequence[Image.Image], Sequence[str]], list[str]],
    shown: Sequence[scenes.Scene],
    images: Sequence[Image.Image],
) -> Figures:
    """Captions and one question of each kind for each scene: share right, held-out triples apart.

    ``generate`` maps images and prompts, an empty one for a caption, to texts.
    """
    captions = _in_batches(generate, images, [""] * len(shown), "captions")
    asked = [(i, question) for i, scene in enumerate(shown) for question in scenes.questions(scene)]
    answers = _in_batches(generate, [images[i] for i, _ in asked], [q.prompt for _, q in asked], "questions")
    right: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for (i, question), answer in zip(asked, answers, strict=True):
        right[question.kind].append((scenes.answer_is_right(answer, question), shown[i].has_held_out))
    return {
        "captions": {
            "right": _shares(scenes.caption_is_right, captions, shown),
            "exact": _shares(scenes.caption_is_exact, captions, shown),
        },
        "questions": {kind: _split(right[kind]) for kind in scenes.KINDS if kind in right},
        "examples": _examples(captions, asked, answers, shown),
    }


def _in_batches(
    generate: Callable[..., list[str]], images: Sequence[Image.Image], prompts: Sequence[str], name: str
) -> list[str]:
    found: list[str] = []
    for first in tqdm(range(0, len(prompts), _BATCH), name):
        found += generate(images[first : first + _BATCH], prompts[first : first + _BATCH])
    return found


def _shares(
    judge: Callable[[str, scenes.Scene], bool], captions: Sequence[str], shown: Sequence[scenes.Scene]
) -> Figures:
    judged = [(judge(text, scene), scene.has_held_out) for text, scene in zip(captions, shown, strict=True)]
    by_count = {
        scenes.COUNTS[n]: _mean(
            [ok for (ok, _), scene in zip(judged, shown, strict=True) if len(scene.things) == n + 1]
        )
        for n in range(3)
    }
    return {**_split(judged), "by_objects": by_count}


def _split(judged: Sequence[tuple[bool, bool]]) -> Figures:
    """Of (right, shows a held-out triple): how many, and the shares of all, of the seen and of the held-out."""
    return {
        "n": len(judged),
        "all": _mean([ok for ok, _ in judged]),
        "seen": _mean([ok for ok, held_out in judged if not held_out]),
        "held_out": _mean([ok for ok, held_out in judged if held_out]),
    }


def _mean(values: Sequence[bool]) -> float:
    return round(float(np.mean(values)), 4) if values else float("nan")


def _examples(
    captions: Sequence[str],
    asked: Sequence[tuple[int, scenes.Question]],
    answers: Sequence[str],
    shown: Sequence[scenes.Scene],
) -> list[Figures]:
    """What the model said of the first six scenes, right or wrong."""
    examples: list[Figures] = []
    for index in range(min(6, len(shown))):
        said = [
            {"question": q.text, "answer": answer, "truth": q.answer}
            for (i, q), answer in zip(asked, answers, strict=True)
            if i == index
        ]
        truth = scenes.caption(shown[index])
        examples.append({"scene": index, "caption": captions[index], "truth": truth, "questions": said})
    return examples


# --- retrieval ------------------------------------------------------------------------------------------------------


def distinct(shown: Sequence[scenes.Scene], images: Sequence[Image.Image]) -> tuple[list[Image.Image], list[str]]:
    """The first POOL images whose captions differ, and the captions."""
    first: dict[str, int] = {}
    for i, scene in enumerate(shown):
        first.setdefault(scenes.caption(scene), i)
    rows = list(first.values())[:POOL]
    return [images[i] for i in rows], [scenes.caption(shown[i]) for i in rows]


class Retriever:
    """The retrieval checkpoint: similarities by ITC, matching probabilities by ITM."""

    def __init__(self, folder: Path) -> None:
        self._model = Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
        self._processor = Blip2Processor.from_pretrained(folder)

    def _inputs(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Any:
        return self._processor(images=list(images), text=list(texts), padding=True, return_tensors="pt")

    @torch.inference_mode()
    def similarities(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """(images, texts) for as many images as texts."""
        image_parts, text_parts = [], []
        for first in range(0, len(images), _BATCH):
            batch = slice(first, first + _BATCH)
            found = self._model(**self._inputs(images[batch], texts[batch]), use_image_text_matching_head=False)
            image_parts.append(found.image_embeds)
            text_parts.append(found.text_embeds)
        scores = torch.einsum("iqe,te->itq", torch.cat(image_parts), torch.cat(text_parts))
        return scores.amax(-1).numpy()

    @torch.inference_mode()
    def matching(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """(pairs,) fp32: the probability that image and text match."""
        parts = []
        for first in range(0, len(images), _BATCH):
            batch = slice(first, first + _BATCH)
            found = self._model(**self._inputs(images[batch], texts[batch]), use_image_text_matching_head=True)
            parts.append(found.logits_per_image.softmax(1)[:, 1])
        return torch.cat(parts).numpy()


def retrieval(folder: Path, images: Sequence[Image.Image], texts: Sequence[str]) -> Figures:
    """Recall by ITC and after ITM has re-ranked the best RERANKED, both ways; ITM's accuracy."""
    model = Retriever(folder)
    scores = model.similarities(images, texts)
    figures: Figures = {"pool": len(images), "reranked": RERANKED}
    for name, way in (("text_to_image", scores.T), ("image_to_text", scores)):
        best = np.argsort(-way, axis=1)[:, :RERANKED]
        owners = np.repeat(np.arange(len(way)), best.shape[1])
        found = best.ravel()
        image_rows, text_rows = (found, owners) if name == "text_to_image" else (owners, found)
        matching = _matching_in_batches(model, images, texts, image_rows, text_rows, name).reshape(best.shape)
        order = np.take_along_axis(best, np.argsort(-matching, axis=1, kind="stable"), 1)
        figures[name] = {"itc": _recall(best), "itm": _recall(order)}
        if name == "image_to_text":
            figures["itm_accuracy"] = _matching_accuracy(model, images, texts, best, matching)
    return figures


def _matching_in_batches(
    model: Retriever,
    images: Sequence[Image.Image],
    texts: Sequence[str],
    rows: np.ndarray,
    others: np.ndarray,
    name: str,
) -> np.ndarray:
    step = 10 * _BATCH
    parts = []
    for first in tqdm(range(0, len(rows), step), f"re-rank {name.replace('_', ' ')}"):
        batch = slice(first, first + step)
        parts.append(model.matching([images[i] for i in rows[batch]], [texts[i] for i in others[batch]]))
    return np.concatenate(parts)


def _recall(ranked: np.ndarray) -> Figures:
    hits = ranked == np.arange(len(ranked))[:, None]
    return {f"r{k}": round(float(hits[:, :k].any(1).mean()), 4) for k in (1, 5)}


def _matching_accuracy(
    model: Retriever, images: Sequence[Image.Image], texts: Sequence[str], best: np.ndarray, matching: np.ndarray
) -> Figures:
    """How often ITM is right about true pairs, about a random wrong text, and about the likest wrong text."""
    count = len(images)
    true = model.matching(images, texts) > 0.5
    shift = np.random.default_rng(0).integers(1, count, size=count)
    random = model.matching(images, [texts[(i + int(s)) % count] for i, s in enumerate(shift)]) <= 0.5
    wrong = best != np.arange(count)[:, None]
    hardest = matching[np.arange(count), wrong.argmax(1)] <= 0.5
    return {
        "matching": _mean(list(true)),
        "random_negative": _mean(list(random)),
        "hardest_negative": _mean(list(hardest)),
    }


# --- the model card -------------------------------------------------------------------------------------------------


def table(figures: Figures) -> str:
    """The results as Markdown tables."""
    names = [GENERATION[name] for name in figures["generation"]]
    lines = ["| | n | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    measured = [_rows(found) for found in figures["generation"].values()]
    for name, shares in measured[0].items():
        values = " | ".join(_percentages(found[name]) for found in measured)
        lines.append(f"| {name} | {shares['n']} | {values} |")
    found = figures["retrieval"]
    lines += ["", f"| retrieval among {found['pool']} | R@1 | R@5 |", "|---|---|---|"]
    for way in ("text_to_image", "image_to_text"):
        for head, name in (("itc", "ITC"), ("itm", f"the {found['reranked']} best by ITC, re-ranked by ITM")):
            recall = found[way][head]
            lines.append(
                f"| {way.replace('_', ' ')}, {name} | {100 * recall['r1']:.1f} % | {100 * recall['r5']:.1f} % |"
            )
    itm = found["itm_accuracy"]
    lines += ["", "| ITM is right about | |", "|---|---|"]
    lines += [f"| {name} | {100 * itm[key]:.1f} % |" for name, key in _MATCHING_ROWS]
    return "\n".join(lines)


def _rows(found: Figures) -> dict[str, Figures]:
    rows = {f"caption, {name}": found["captions"][key] for name, key in _CAPTION_ROWS}
    return rows | {f"question: {kind}": shares for kind, shares in found["questions"].items()}


def _percentages(shares: Figures) -> str:
    """Of all scenes, and in parentheses of those with seen and those with held-out triples."""
    whole, seen, held_out = (f"{100 * shares[key]:.1f}" for key in ("all", "seen", "held_out"))
    return f"{whole} % ({seen}, {held_out})"


_CAPTION_ROWS = (("every attribute right", "right"), ("word for word", "exact"))
_MATCHING_ROWS = (
    ("pairs that match", "matching"),
    ("a random other caption", "random_negative"),
    ("the likest other caption by ITC", "hardest_negative"),
)


def examples(figures: Figures) -> str:
    """What the checkpoints said of the first scenes, as a Markdown table."""
    found = figures["generation"]
    names = " | ".join(GENERATION[name] for name in found)
    lines = [f"| scene | truth | {names} |", "|---" * (2 + len(found)) + "|"]
    for told in zip(*(one["examples"] for one in found.values()), strict=True):
        captions = " | ".join(example["caption"] for example in told)
        lines.append(f"| test {told[0]['scene']} | {told[0]['truth']} | {captions} |")
        for said in zip(*(example["questions"] for example in told), strict=True):
            answers = " | ".join(one["answer"] for one in said)
            lines.append(f"| {said[0]['question']} | {said[0]['truth']} | {answers} |")
    return "\n".join(lines)


def fill_card(card: Path, figures: Figures) -> None:
    """Replace what stands between the markers ``<!-- results -->`` and ``<!-- examples -->`` and their ends."""
    text = card.read_text()
    for name, content in (("results", table(figures)), ("examples", examples(figures))):
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        match = pattern.search(text)
        if not match:
            raise ValueError(f"{card} has no markers for {name}")
        before, after = match.end(1), match.start(2)
        text = text[:before] + content + "\n" + text[after:]
    card.write_text(text)
