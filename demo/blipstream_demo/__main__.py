"""Command line: ``python -m blipstream_demo train``, ``evaluate`` and ``test-set``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Large tensors come and go at every step: keep their memory instead of giving it back to the system each time, which
# costs a third of the run. glibc reads these once, at the start of a process.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def main() -> None:
    demo = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(prog="blipstream_demo", description="Blipstream's own tiny BLIP-2.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train all checkpoints from nothing; run again to go on")
    train.add_argument("--work", type=Path, default=demo / "work", help="where data and stages are kept")
    train.add_argument("--out", type=Path, default=demo, help="where the checkpoints go")
    evaluate = commands.add_parser("evaluate", help="measure the checkpoints on test scenes, fill in the model card")
    evaluate.add_argument("--demo", type=Path, default=demo, help="the folder with the checkpoints and the card")
    evaluate.add_argument("--scenes", type=int, default=1000, help="number of test scenes")
    evaluate.add_argument("--only", nargs="+", help="folders of checkpoints; the others' figures are kept")
    test_set = commands.add_parser("test-set", help="draw test scenes, for blipstream build --test-set")
    test_set.add_argument("folder", type=Path)
    test_set.add_argument("--scenes", type=int, default=1000, help="number of test scenes")
    options = parser.parse_args()
    if options.command == "train":
        if not all(name in os.environ for name in _MALLOC):
            os.execve(
                sys.executable, [sys.executable, "-m", "blipstream_demo", *sys.argv[1:]], {**os.environ, **_MALLOC}
            )
        from . import pipeline

        pipeline.train(options.work, options.out)
    elif options.command == "test-set":
        from . import samples

        print(samples.write_test_set(options.folder, options.scenes))
    else:
        from . import evaluation

        evaluation.main(options.demo, options.scenes, options.only or evaluation.CHECKPOINTS)


if __name__ == "__main__":
    main()
