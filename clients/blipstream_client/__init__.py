"""Python client of a Blipstream server: images and prompts in, text out, at once or as it is generated.

::

    with Client("localhost:8001") as client:
        print(client.caption("photo.jpg").text)
        for chunk in client.stream("photo.jpg", "Question: what is this? Answer:"):
            print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

from blipstream import __version__ as __version__
from blipstream.contract import QUESTION_TEMPLATE
from blipstream_client.aio import AsyncClient, AsyncTextStream
from blipstream_client.answers import FinishReason, Generation, TextChunk
from blipstream_client.chat import Conversation, Turn
from blipstream_client.client import Client, TextStream
from blipstream_client.images import Images, ImageSource
from blipstream_client.options import DecodingOptions, question_prompt
from blipstream_client.transport import DEFAULT_URL

__all__ = [
    "DEFAULT_URL",
    "QUESTION_TEMPLATE",
    "AsyncClient",
    "AsyncTextStream",
    "Client",
    "Conversation",
    "DecodingOptions",
    "FinishReason",
    "Generation",
    "ImageSource",
    "Images",
    "TextChunk",
    "TextStream",
    "Turn",
    "question_prompt",
]
