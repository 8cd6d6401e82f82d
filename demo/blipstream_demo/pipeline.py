"""Everything from nothing to the checkpoints: render, pre-train vision and the language models two at a time, cache
features, the Q-Former's first stage, its second stage for each language model, save. Each step goes on where a killed
run stopped."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Blip2VisionModel, PreTrainedModel

from . import checkpoint, data, features, language, plots, stage_one, stage_two, tokens, vision
from .training import Recipe, is_done

DEMO = Path(__file__).resolve().parents[1]
RECIPES = {
    recipe.name: recipe
    for recipe in (
        vision.RECIPE,
        *(lesson.recipe for kind in (language.OPT, language.LLAMA, language.T5) for lesson in kind.lessons),
        stage_one.RECIPE,
        stage_two.OPT,
        stage_two.T5,
        stage_two.INSTRUCT,
    )
}


@dataclass(frozen=True)
class Plan:
    """How many scenes are rendered and cached, and the recipe of each stage by its name."""

    scenes: int = 120_000
    crowds: int = 50_000
    validation: int = 2_000
    cached: int = 48_000
    recipes: Mapping[str, Recipe] = field(default_factory=lambda: RECIPES)


@dataclass(frozen=True)
class Branch:
    """A generation checkpoint: its folder, the language model, the second stage's name, the Q-Former's shape and the
    layers of the first stage's that it starts from, and whether the Q-Former reads the prompt."""

    folder: str
    language: language.Kind
    stage: str
    shape: checkpoint.Shape
    layers: tuple[int, ...]
    instructed: bool = False


_SMALL = checkpoint.Shape(layers=3, frequency=2), (0, 1, 3)
FIRST = Branch("checkpoint", language.OPT, stage_two.OPT.name, checkpoint.Shape(), (0, 1, 2, 3))
OTHERS = (
    Branch("checkpoint-t5", language.T5, stage_two.T5.name, *_SMALL),
    Branch("checkpoint-instruct", language.LLAMA, stage_two.INSTRUCT.name, *_SMALL, instructed=True),
)

PLAN = Plan()


def train(work: Path, out: Path = DEMO, plan: Plan = PLAN) -> None:
    """Train in ``work`` and write the checkpoints' folders and ``training/`` under ``out``."""
    work.mkdir(parents=True, exist_ok=True)
    for split, count in (("val", plan.validation), ("crowd", plan.crowds), ("train", plan.scenes)):
        data.render_split(work / split, split, count)
    kinds = [branch.language for branch in (FIRST, *OTHERS)]
    _side_by_side(
        {vision.RECIPE.name: (_vision, work, plan)}
        | {kind.recipe.name: (_language, work, plan, kind) for kind in kinds},
        work,
        plan,
    )
    torch.set_num_threads(2)
    encoder = load_vision(work, plan)
    split = data.open_split(work / "train")
    cached = features.cache(work / "features-train.npy", encoder, split, plan.cached)
    one = first_stage(encoder)
    stage_one.train(work, one, cached, split.things, plan.recipes[stage_one.RECIPE.name])
    _second(work, plan, FIRST)
    _side_by_side({branch.stage: (_second, work, plan, branch, 1) for branch in OTHERS}, work, plan)
    checkpoint.save_retrieval(one.model, one.tokenizer, out / "checkpoint-retrieval", checkpoint.SHARED_VISION)
    for branch in (FIRST, *OTHERS):
        save(second_stage(work, plan, branch, trained=True), out / branch.folder)
    plots.draw(work, out / "training")


def _side_by_side(tasks: dict[str, tuple[Any, ...]], work: Path, plan: Plan) -> None:
    """Run functions (with their arguments) that train a stage each, two at a time, in a process and on a core each."""
    context = multiprocessing.get_context("spawn")

    def run(name: str, target: Callable[..., None], *args: Any) -> bool:
        if is_done(work, plan.recipes[name]):
            return True
        process = context.Process(target=target, args=args, name=name)
        process.start()
        process.join()
        return process.exitcode == 0

    with ThreadPoolExecutor(2) as pool:
        outcomes = {name: pool.submit(run, name, *task) for name, task in tasks.items()}
    failed = [name for name, outcome in outcomes.items() if not outcome.result()]
    if failed:
        raise RuntimeError(f"training of {' and '.join(failed)} failed; run again to go on from its last checkpoint")


def _vision(work: Path, plan: Plan) -> None:
    torch.set_num_threads(1)
    vision.train(work, plan.recipes[vision.RECIPE.name])


def _language(work: Path, plan: Plan, kind: language.Kind) -> None:
    torch.set_num_threads(1)
    language.train(work, kind, plan.recipes)


def _second(work: Path, plan: Plan, branch: Branch, threads: int = 2) -> None:
    torch.set_num_threads(threads)
    cached = features.cache(
        work / "features-train.npy", load_vision(work, plan), data.open_split(work / "train"), plan.cached
    )
    stage_two.train(work, second_stage(work, plan, branch), cached, plan.recipes[branch.stage])


def load_vision(work: Path, plan: Plan = PLAN) -> Blip2VisionModel:
    """The pre-trained vision encoder, its weights rounded to what the checkpoint stores."""
    model = vision.VisionPretraining(vision.config())
    _load(model, work, plan.recipes[vision.RECIPE.name])
    return _rounded(model.encoder)


def load_language(work: Path, plan: Plan, kind: language.Kind) -> PreTrainedModel:
    """A pre-trained language model, rounded in the same way."""
    model = language.build(kind.build_config(kind.build_tokenizer()))
    _load(model, work, plan.recipes[kind.recipe.name])
    return _rounded(model)


def _load(model: torch.nn.Module, work: Path, recipe: Recipe) -> None:
    """What a run has kept: the parameters that it trained."""
    state = torch.load(work / f"{recipe.name}.pt", weights_only=True)["model"]
    model.load_state_dict(state, strict=False)


def _rounded(model: torch.nn.Module) -> Any:
    return model.half().float().eval().requires_grad_(False)


def first_stage(encoder: Blip2VisionModel) -> stage_one.StageOne:
    torch.manual_seed(1)
    wordpiece = tokens.build_wordpiece_tokenizer()
    model = checkpoint.retrieval_model(encoder.config, len(wordpiece), language.QUERIES)
    model.vision_model.load_state_dict(encoder.state_dict())
    return stage_one.StageOne(model, wordpiece)


def second_stage(work: Path, plan: Plan, branch: Branch, trained: bool = False) -> stage_two.StageTwo:
    """The second stage as it starts, from the first stage in ``work``, or as its run has left it."""
    encoder, language_model = load_vision(work, plan), load_language(work, plan, branch.language)
    one = first_stage(encoder)
    _load(one, work, plan.recipes[stage_one.RECIPE.name])
    stage = assemble(branch, encoder, language_model, one)
    if trained:
        _load(stage, work, plan.recipes[branch.stage])
    return stage


def assemble(
    branch: Branch, encoder: Blip2VisionModel, language_model: PreTrainedModel, one: stage_one.StageOne
) -> stage_two.StageTwo:
    """The second stage of a branch from its parts."""
    torch.manual_seed(2)
    tokenizer = branch.language.build_tokenizer()
    parts = encoder.config, language_model.config, tokenizer
    stage: stage_two.StageTwo
    if branch.instructed:
        model = checkpoint.instruct_model(*parts, len(one.tokenizer), language.QUERIES, branch.shape)
        stage = stage_two.InstructStageTwo(model, tokenizer, one.tokenizer)
    else:
        model = checkpoint.generation_model(*parts, language.QUERIES, branch.shape)
        stage = stage_two.Blip2StageTwo(model, tokenizer)
    model.vision_model.load_state_dict(encoder.state_dict())
    model.language_model.load_state_dict(language_model.state_dict())
    stage.start_from(one.model, branch.layers)
    return stage


def save(stage: stage_two.StageTwo, folder: Path) -> None:
    """Write a generation checkpoint; the first one has the vision encoder, the others point to it."""
    shared = None if folder.name == FIRST.folder else checkpoint.SHARED_VISION
    wordpiece = stage.wordpiece if isinstance(stage, stage_two.InstructStageTwo) else None
    checkpoint.save_generation(stage.model, stage.tokenizer, folder, shared, wordpiece)
