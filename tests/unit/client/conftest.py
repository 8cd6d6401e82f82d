"""Servers and clients for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from blipstream_client import AsyncClient, Client

from tests.unit.client.blocking import Background, Blocking
from tests.unit.client.fake_server import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes clients, of either kind."""
    background = Background()
    clients: list[Any] = []

    def make(url: str, **settings: Any) -> Any:
        client = (
            Client(url, **settings) if request.param == "sync" else Blocking(background, AsyncClient(url, **settings))
        )
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()
    background.close()


@pytest.fixture
def client(connect: Callable[..., Any], server: FakeServer) -> Any:
    return connect(server.url)
