"""The environments of the peers: each has what its users would install, whatever Blipstream needs."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

_TORCH = "torch==2.13.0"
_TRANSFORMERS = ("transformers==5.24.0", "pillow")
REQUIREMENTS: dict[str, Sequence[str]] = {
    "transformers": (_TORCH, *_TRANSFORMERS),
    "ctranslate2": (_TORCH, *_TRANSFORMERS, "ctranslate2==4.8.5"),
    "openvino": (_TORCH, *_TRANSFORMERS, "openvino==2026.4.1", "nncf==3.4.0"),
}
"""What each is made of; torch comes first and by version, as in the Makefile."""
PROJECT = "blipstream"
"""The environment that this process runs in."""
_MARK = "requirements.txt"


def python(name: str, work: Path) -> Path:
    """The interpreter of an environment, which is made if it is missing or has other requirements.

    Raises:
        subprocess.CalledProcessError: something could not be installed.
    """
    if name == PROJECT:
        return Path(sys.executable)
    folder = work / "environments" / name
    interpreter, mark, wanted = folder / "bin" / "python", folder / _MARK, "\n".join(REQUIREMENTS[name])
    if not mark.exists() or mark.read_text() != wanted:
        venv.create(folder, clear=True, with_pip=True)
        install = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, REQUIREMENTS[name][0]], check=True)
        subprocess.run([*install, *REQUIREMENTS[name]], check=True)
        mark.write_text(wanted)
    return interpreter
