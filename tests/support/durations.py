"""How long the tests take: read from a run's JUnit file, kept as a table by which the next run orders its modules.

python -m tests.support.durations .work/test/junit.xml            # the slowest modules
python -m tests.support.durations .work/test/junit.xml --record   # write tests/durations.json
"""

from __future__ import annotations

import argparse
import functools
import json
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "durations.json"
UNKNOWN_S = 30.0
"""What a module is taken for that the table does not have: it starts early."""
RECORDED_FROM_S = 1.0


def read_modules(junit: Path) -> Counter[str]:
    """Seconds of each test module, set-up included."""
    seconds: Counter[str] = Counter()
    for case in ET.parse(junit).iter("testcase"):
        name = case.get("classname", "").replace(".", "/")
        while name and not (TABLE.parents[1] / f"{name}.py").is_file():
            name = name.rpartition("/")[0]  # a class within the module
        seconds[f"{name}.py"] += float(case.get("time", 0))
    return seconds


@functools.cache
def load() -> dict[str, float]:
    table: dict[str, float] = json.loads(TABLE.read_text())
    return table


def record(modules: Counter[str]) -> None:
    slow = {name: round(value) for name, value in modules.most_common() if value >= RECORDED_FROM_S}
    quick = {name: 0 for name in sorted(modules) if name not in slow}
    TABLE.write_text(json.dumps({**slow, **quick}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("junit", type=Path)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    modules = read_modules(options.junit)
    if options.record:
        record(modules)
    print(f"{sum(modules.values()):.0f} s in {len(modules)} modules, of which")
    for name, value in modules.most_common(25):
        print(f"{value:7.1f} s  {name}")


if __name__ == "__main__":
    main()
