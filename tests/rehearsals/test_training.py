"""The whole training, with a few steps of everything: from nothing to the checkpoints and the model card's figures."""

import json
import shutil

import pytest
from blipstream_demo import evaluation, pipeline, scenes
from blipstream_demo.training import Recipe, read_log

BATCHES = {"vision": 5, "stage_one": 8}
PLAN = pipeline.Plan(
    scenes=40,
    crowds=30,
    validation=5,
    cached=40,
    recipes={name: Recipe(name, steps=2, batch=BATCHES.get(name, 4)) for name in pipeline.RECIPES},
)


def in_turn(tasks, *_):
    """In place of a process each, most of whose time is imports; training again, below, starts them."""
    for train, *arguments in tasks.values():
        train(*arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_side_by_side", in_turn)
        pipeline.train(folder / "work", folder, PLAN)
    return folder


@pytest.mark.slow
def test_training_from_nothing_writes_checkpoints_and_plots(trained):
    for stage in pipeline.RECIPES:
        assert (trained / "training" / f"{stage}.png").stat().st_size > 1000
        assert [entry["step"] for entry in read_log(trained / "work" / f"{stage}.jsonl")] == [1]
    shown = scenes.test_scenes(6)
    for name in evaluation.GENERATION:
        generate = evaluation.Generator(trained / name)
        figures = evaluation.generation(generate, shown, [scenes.render(scene) for scene in shown])
        assert figures["captions"]["right"]["n"] == 6
        assert figures["captions"]["right"]["all"] < 0.5  # two steps teach nothing
        assert set(figures["questions"]) <= set(scenes.KINDS)


@pytest.mark.slow
def test_training_again_goes_on_from_the_last_stage(trained):
    kept = (trained / "work" / "vision.pt").read_bytes()
    again = {"checkpoint": "stage_two", "checkpoint-instruct": "stage_two_instruct"}
    first = {name: (trained / name / "model-text.safetensors").read_bytes() for name in again}
    for name, stage in again.items():
        (trained / "work" / f"{stage}.pt").unlink()
        shutil.rmtree(trained / name)
    pipeline.train(trained / "work", trained, PLAN)
    assert (trained / "work" / "vision.pt").read_bytes() == kept
    assert {name: (trained / name / "model-text.safetensors").read_bytes() for name in again} == first


@pytest.mark.slow
def test_evaluation_fills_in_the_card(trained, monkeypatch):
    monkeypatch.setattr(evaluation, "POOL", 20)
    card = "# Card\n<!-- results -->\nold\n<!-- end of results -->\n<!-- examples -->\n<!-- end of examples -->\nend\n"
    (trained / "README.md").write_text(card)
    evaluation.main(trained, 24)
    text = (trained / "README.md").read_text()
    assert "old" not in text
    assert "| question: colour |" in text
    assert text.endswith("<!-- end of examples -->\nend\n")
    figures = json.loads((trained / "evaluation.json").read_text())
    assert set(figures["generation"]) == set(evaluation.GENERATION)
    assert figures["retrieval"]["pool"] == 20
    assert 0 <= figures["retrieval"]["text_to_image"]["itm"]["r1"] <= 1
    figures["generation"]["checkpoint"]["captions"]["exact"]["all"] = 0.123
    (trained / "evaluation.json").write_text(json.dumps(figures))
    evaluation.main(trained, 24, ["checkpoint-t5"])  # what is not measured again is kept
    assert "| caption, word for word | 24 | 12.3 % (" in (trained / "README.md").read_text()
    with pytest.raises(ValueError, match=r"evaluation\.json is not about 12 scenes; measure all checkpoints"):
        evaluation.main(trained, 12, ["checkpoint-t5"])


def test_a_card_without_markers_is_refused(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# Card\n")
    empty = {"n": 1, "all": 1.0, "seen": 1.0, "held_out": 1.0}
    recall = {head: {"r1": 1.0, "r5": 1.0} for head in ("itc", "itm")}
    itm = {"matching": 1.0, "random_negative": 1.0, "hardest_negative": 1.0}
    figures = {
        "generation": {"checkpoint": {"captions": {"right": empty, "exact": empty}, "questions": {}, "examples": []}},
        "retrieval": {
            "pool": 1,
            "reranked": 1,
            "text_to_image": recall,
            "image_to_text": recall,
            "itm_accuracy": itm,
        },
    }
    with pytest.raises(ValueError, match="has no markers for results"):
        evaluation.fill_card(card, figures)
