"""Test scenes as PNG files: the sample images of ``make demo``, and a test set for ``blipstream build --test-set``."""

from __future__ import annotations

import json
from pathlib import Path

from . import scenes

SIZE = 384
_CHOSEN = ((13, "colour"), (26, "shape"), (38, "size"), (17, "count"), (20, "existence"), (14, "relation"))


def write(folder: Path) -> None:
    """Draw the chosen test scenes, four times as large as the model's input.

    ``samples.json`` is a list of ``{"file", "scene", "caption", "kind", "question", "answer"}``: the number of the test
    scene, its own caption, and one question with its right answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for index, kind in _CHOSEN:
        scene = scenes.scene("test", index)
        question = next(q for q in scenes.questions(scene) if q.kind == kind)
        name = f"scene-{index}.png"
        scenes.render(scene, SIZE).save(folder / name, optimize=True)
        samples.append(
            {
                "file": name,
                "scene": index,
                "caption": scenes.caption(scene),
                "kind": kind,
                "question": question.text,
                "answer": question.answer,
            }
        )
    (folder / "samples.json").write_text(json.dumps(samples, indent=1) + "\n")


def write_test_set(folder: Path, count: int) -> Path:
    """Draw the first ``count`` test scenes, and write what is asked about them to ``questions.jsonl``; return its path.

    A line is ``{"image", "prompt", "answers", "kind"}``: the caption, and one question of each kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "questions.jsonl"
    with path.open("w") as file:
        for index, scene in enumerate(scenes.test_scenes(count)):
            name = f"{index}.png"
            scenes.render(scene).save(folder / name, compress_level=1)
            asked = [(question.prompt, question.answer, question.kind) for question in scenes.questions(scene)]
            for prompt, answer, kind in [("", scenes.caption(scene), "caption"), *asked]:
                line = {"image": name, "prompt": prompt, "answers": [answer], "kind": kind}
                file.write(json.dumps(line) + "\n")
    return path
