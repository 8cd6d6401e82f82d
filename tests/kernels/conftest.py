"""Where the kernels run: on a GPU if there is one, else in the interpreter."""

from __future__ import annotations

import pytest
import torch
from blipstream_kernels.tiles import INTERPRETED


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each test that takes it is run in the interpreter and on a GPU, as far as they are there."""
    if request.param == "interpreter" and not INTERPRETED.value:
        pytest.skip("the kernels are compiled in this process; set TRITON_INTERPRET=1 to run them in the interpreter")
    if request.param == "cuda" and INTERPRETED.value:
        pytest.skip("TRITON_INTERPRET=1: the kernels are interpreted in this process")
    return torch.device("cpu" if request.param == "interpreter" else "cuda")
