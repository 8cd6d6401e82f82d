"""Real models as deferred ones, for tests that compare the two."""

from __future__ import annotations

from blipstream_export.deferred import deferred, label_parameters
from torch import Tensor, nn


def defer_parameters(model: nn.Module) -> None:
    """Let every parameter of ``model`` be computed when it is used; what is tied stays tied."""
    made: dict[int, tuple[Tensor, nn.Parameter]] = {}  # with the old one, whose id no other may take
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                lazy = deferred(tuple(value.shape), value.dtype, value.detach)
                _, parameter = made.setdefault(id(value), (value, nn.Parameter(lazy, requires_grad=False)))
                module._parameters[name] = parameter
    label_parameters(model)
