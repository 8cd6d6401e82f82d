"""What pytest's XML says."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TestSummary:
    """Of one run of pytest.

    Attributes:
        passed: how many did.
        failed: names of those that failed, or whose fixtures did.
        skipped: how many tests were skipped for each reason.
    """

    __test__ = False  # pytest takes a class of this name for a test

    passed: int
    failed: tuple[str, ...]
    skipped: Counter[str]


def read_junit(path: Path) -> TestSummary | None:
    """Read it; None where pytest wrote none or did not come to its end."""
    try:
        cases = list(ET.parse(path).iter("testcase"))
    except (OSError, ET.ParseError):
        return None
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [found for case in cases if (found := case.find("skipped")) is not None]
    names = tuple(f"{case.get('classname')}::{case.get('name')}" for case in failed)
    reasons = Counter(element.get("message", "") for element in skipped)
    return TestSummary(len(cases) - len(failed) - len(skipped), names, reasons)
