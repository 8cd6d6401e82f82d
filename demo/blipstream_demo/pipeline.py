"""Everything from nothing to the two checkpoints: render, pre-train vision and language side by side, cache features,
the Q-Former's two stages, save. Each step goes on where a killed run stopped."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BertTokenizerFast, Blip2VisionModel, OPTForCausalLM, PreTrainedTokenizerFast

from . import checkpoint, data, features, language, plots, stage_one, stage_two, text, vision
from .training import Recipe, is_done

DEMO = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Plan:
    """How many scenes are rendered and cached, and the recipe of each stage."""

    scenes: int = 120_000
    crowds: int = 50_000
    validation: int = 2_000
    cached: int = 48_000
    vision: Recipe = vision.RECIPE
    language: Recipe = language.RECIPE
    stage_one: Recipe = stage_one.RECIPE
    stage_two: Recipe = stage_two.RECIPE


PLAN = Plan()


def train(work: Path, out: Path = DEMO, plan: Plan = PLAN) -> None:
    """Train in ``work`` and write ``checkpoint/``, ``checkpoint-retrieval/`` and ``training/`` under ``out``."""
    work.mkdir(parents=True, exist_ok=True)
    for split, count in (("val", plan.validation), ("crowd", plan.crowds), ("train", plan.scenes)):
        data.render_split(work / split, split, count)
    _pretrain(work, plan)
    torch.set_num_threads(2)
    tokenizer, wordpiece = text.build_opt_tokenizer(), text.build_wordpiece_tokenizer()
    encoder = load_vision(work, plan)
    split = data.open_split(work / "train")
    cached = features.cache(work / "features-train.npy", encoder, split, plan.cached)
    one = first_stage(encoder, wordpiece)
    stage_one.train(work, one, cached, split.things, wordpiece, plan.stage_one)
    two = second_stage(encoder, load_language(work, plan, tokenizer), one, tokenizer)
    stage_two.train(work, two, cached, tokenizer, plan.stage_two)
    save(one, two, wordpiece, tokenizer, out)
    plots.draw(work, out / "training")


def _pretrain(work: Path, plan: Plan) -> None:
    """Vision and language in a process and on a core each."""
    for recipe in (plan.vision, plan.language):
        mark = work / f"{recipe.name}.done"
        mark.unlink(missing_ok=True)
        if is_done(work, recipe):
            mark.touch()
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=target, args=(work, recipe), name=recipe.name)
        for target, recipe in ((_vision, plan.vision), (_language, plan.language))
        if not (work / f"{recipe.name}.done").exists()
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = [process.name for process in processes if process.exitcode]
    if failed:
        raise RuntimeError(f"training of {' and '.join(failed)} failed; run again to go on from its last checkpoint")


def _vision(work: Path, recipe: Recipe) -> None:
    torch.set_num_threads(1)
    vision.train(work, recipe)
    (work / f"{recipe.name}.done").touch()


def _language(work: Path, recipe: Recipe) -> None:
    torch.set_num_threads(1)
    language.train(work, text.build_opt_tokenizer(), recipe)
    (work / f"{recipe.name}.done").touch()


def load_vision(work: Path, plan: Plan = PLAN) -> Blip2VisionModel:
    """The pre-trained vision encoder, its weights rounded to what the checkpoint stores."""
    model = vision.VisionPretraining(vision.config())
    model.load_state_dict(torch.load(work / f"{plan.vision.name}.pt", weights_only=True)["model"])
    return _rounded(model.encoder)


def load_language(work: Path, plan: Plan, tokenizer: PreTrainedTokenizerFast) -> OPTForCausalLM:
    model = OPTForCausalLM(language.config(tokenizer))
    model.load_state_dict(torch.load(work / f"{plan.language.name}.pt", weights_only=True)["model"], strict=False)
    return _rounded(model)


def _rounded(model: torch.nn.Module) -> torch.nn.Module:
    return model.half().float().eval().requires_grad_(False)


def first_stage(encoder: Blip2VisionModel, wordpiece: BertTokenizerFast) -> stage_one.StageOne:
    torch.manual_seed(1)
    model = checkpoint.retrieval_model(encoder.config, len(wordpiece), language.QUERIES)
    model.vision_model.load_state_dict(encoder.state_dict())
    return stage_one.StageOne(model, wordpiece)


def second_stage(
    encoder: Blip2VisionModel,
    language_model: OPTForCausalLM,
    one: stage_one.StageOne,
    tokenizer: PreTrainedTokenizerFast,
) -> stage_two.StageTwo:
    torch.manual_seed(2)
    model = checkpoint.generation_model(encoder.config, language_model.config, tokenizer, language.QUERIES)
    model.vision_model.load_state_dict(encoder.state_dict())
    model.language_model.load_state_dict(language_model.state_dict())
    stage = stage_two.StageTwo(model)
    stage.start_from(one.model)
    return stage


def save(
    one: stage_one.StageOne,
    two: stage_two.StageTwo,
    wordpiece: BertTokenizerFast,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
) -> None:
    checkpoint.save_generation(two.model, tokenizer, out / "checkpoint")
    shared = f"../checkpoint/{checkpoint.VISION_SHARD}"
    checkpoint.save_retrieval(one.model, wordpiece, out / "checkpoint-retrieval", shared)
