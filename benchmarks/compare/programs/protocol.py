"""How a peer's process is asked: a job a line on standard input, an answer a line on standard output, both JSON.

A job is ``{"task": ..., "requests": [{...}, ...], "output": FILE}``. An answer is ``{"tokens": [[...], ...]}``, or
``{}`` with an array in the job's file (.npy), or ``{"error": ...}``. The first line that a process writes is
``{"versions": {package: version}}``, when its model is loaded.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Job = dict[str, Any]
Tokens = list[list[int]]
Output = Tokens | npt.NDArray[np.float32]


def serve(load: Callable[[], Callable[[Job], Output]], packages: Sequence[str]) -> None:
    """Load, then answer jobs until standard input ends.

    Args:
        load: makes what answers a job.
        packages: whose versions are told.
    """
    # what libraries print must not come between the answers
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        answer = load()
        _say(answers, {"versions": {name: importlib.metadata.version(name) for name in packages}})
        for line in sys.stdin:
            _say(answers, _answer(answer, json.loads(line)))


def _answer(answer: Callable[[Job], Output], job: Job) -> dict[str, Any]:
    try:
        output = answer(job)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    if isinstance(output, list):
        return {"tokens": output}
    np.save(job["output"], output)
    return {}


def _say(stream: Any, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()
