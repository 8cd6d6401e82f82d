"""Options of the command line that are declared together, as the fields of a dataclass."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints

Command = Callable[..., None]


def with_options(kind: type, variables: str | None = None) -> Callable[[Command], Command]:
    """Give a command, in place of its last parameter ``options``, the options that a dataclass has as its fields.

    Args:
        kind: the dataclass.
        variables: begins the name of the environment variable that sets an option which is not given; None sets none.
    """
    hints = get_type_hints(kind, include_extras=True)
    if variables is not None:
        for name, hint in hints.items():
            hint.__metadata__[0].envvar = f"{variables}{name.upper()}"
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(kind)
    ]

    def decorate(command: Command) -> Command:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.name != "options"
        ]

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            options = kind(**{name: arguments.pop(name) for name in hints})
            command(**arguments, options=options)

        parameters = [*own, *shared]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
