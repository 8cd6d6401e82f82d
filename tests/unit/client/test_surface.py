"""The two clients are one to their users."""

from __future__ import annotations

import inspect

import blipstream_client
import pytest


@pytest.mark.parametrize(
    "name", ["Client", "AsyncClient", "TextStream", "AsyncTextStream", "Conversation", "Generation"]
)
def test_every_public_method_says_what_it_does(name: str) -> None:
    for attribute, value in vars(getattr(blipstream_client, name)).items():
        if inspect.isfunction(value) and not attribute.startswith("_"):
            assert value.__doc__, f"{name}.{attribute}"


@pytest.mark.parametrize("method", ["__init__", "generate", "stream", "caption", "ask", "ready"])
def test_both_clients_take_the_same(method: str) -> None:
    sync = inspect.signature(getattr(blipstream_client.Client, method)).parameters
    aio = inspect.signature(getattr(blipstream_client.AsyncClient, method)).parameters
    assert list(sync.values()) == list(aio.values())
