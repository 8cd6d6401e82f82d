"""The training loop: killed and resumed it does what it does uninterrupted; rendering goes on where it stopped."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from blipstream_demo import data, scenes
from blipstream_demo.training import Ahead, Recipe, Run, optimisers, orthogonalise, read_log
from torch import nn

RECIPE = Recipe("tiny", steps=14, batch=8, save_every=3)

SCRIPT = """
import os, pathlib, signal, sys
sys.path[:0] = {paths!r}
from test_training import run
run(pathlib.Path(sys.argv[1]), die_at=10)
"""


def run(folder, die_at=None):
    """Train a small network on random data, with dropout, so that batch and noise both depend on the step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.2), nn.ReLU(), nn.Linear(64, 3))

    def loss(step, rng):
        if step == die_at:
            import os

            os.kill(os.getpid(), signal.SIGKILL)
        inputs = torch.from_numpy(rng.standard_normal((RECIPE.batch, 64), dtype=np.float32))
        return (model(inputs) - inputs[:, :3]).square().mean(), {}

    training = Run(folder, RECIPE, model, loss)
    training.train()
    return model


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    whole = run(tmp_path / "whole")
    paths = [*sys.path, str(__import__("pathlib").Path(__file__).parent)]
    command = [sys.executable, "-c", SCRIPT.format(paths=paths), str(tmp_path / "killed")]
    killed = subprocess.run(command, capture_output=True, timeout=50)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert torch.load(tmp_path / "killed" / "tiny.pt", weights_only=True)["step"] == 9
    resumed = run(tmp_path / "killed")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    logs = [read_log(tmp_path / name / "tiny.jsonl") for name in ("whole", "killed")]
    steps = [[(entry["step"], entry["loss"]) for entry in log] for log in logs]
    assert steps[0] == steps[1]
    assert [step for step, _ in steps[0]] == [1, 10]


def test_a_log_line_cut_short_is_left_out(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"step": 10}) + '\n{"step": 2')
    assert read_log(log) == [{"step": 10}]


def test_factors_go_to_the_parameters_that_they_name():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64) for name in ("q", "other")})
    recipe = Recipe("x", steps=1, batch=1, factors={r"^q\.weight": 0.5, "bias": 3.0})
    muon, adam = optimisers(model, recipe)
    assert [(group["factor"], len(group["params"])) for group in muon.param_groups] == [(0.5, 1), (1.0, 1)]
    assert [(group["factor"], len(group["params"])) for group in adam.param_groups] == [(3.0, 2)]


def test_the_rate_rises_stays_and_falls_to_nothing():
    recipe = Recipe("x", steps=100, batch=1, warmup=0.1, decay=0.5)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[0] < 0.2
    assert rates[10:50] == [1.0] * 40
    assert rates[75] == pytest.approx(0.5)
    assert rates[100] == 0


@pytest.mark.parametrize("shape", [(2, 64, 96), (1, 96, 64)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_batches_are_prepared_ahead_and_in_step():
    asked = []
    batches = Ahead(lambda step: asked.append(step) or step * step)
    assert [batches(step) for step in (5, 6, 7)] == [25, 36, 49]
    assert sorted(asked)[:3] == [5, 6, 7]


def test_rendering_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK", 2)
    folder = tmp_path / "val"
    data._render_chunk((_started(folder, 5), "val", 0, 2))
    np.load(folder / "images.npy", mmap_mode="r+")[0] = 0  # a whole chunk is not drawn again
    split = data.render_split(folder, "val", 5, processes=1)
    assert not split.images[0].any()
    for index in (1, 4):
        assert np.array_equal(split.images[index], np.asarray(scenes.render(scenes.scene("val", index))))
        assert data.decode(split.things[index]) == list(scenes.scene("val", index).triples)


def _started(folder, count):
    """A folder with empty arrays, as a killed run leaves them."""
    folder.mkdir()
    for name, shape in data._FIELDS.items():
        data._array(folder / f"{name}.npy", (count, *shape))
    return folder


def test_arrays_of_another_size_are_drawn_anew(tmp_path):
    data.render_split(tmp_path / "val", "val", 3, processes=1)
    split = data.render_split(tmp_path / "val", "val", 4, processes=1)
    assert np.array_equal(split.images[0], np.asarray(scenes.render(scenes.scene("val", 0))))
    assert len(split.images) == 4
