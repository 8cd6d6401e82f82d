"""A peer that knows no model: it says what it is told to, on a standard output that it also clutters."""

from __future__ import annotations

import os
import sys

import numpy as np

from benchmarks.compare.programs.protocol import Job, Output, serve


def answer(job: Job) -> Output:
    print("clutter", flush=True)
    os.write(1, b"clutter of a library\n")
    if job["task"] == "fail":
        raise ValueError("no such thing\nin two lines")
    if job["task"] == "die":
        os._exit(7)
    if job["task"] == "array":
        return np.arange(3, dtype=np.float32)
    return [[request["number"]] for request in job["requests"]]


if __name__ == "__main__":
    if "--broken" in sys.argv:
        raise SystemExit("this model cannot be loaded")
    serve(lambda: answer, ("numpy",))
