"""The asynchronous client."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import tenacity
from tritonclient.grpc import service_pb2

from blipstream.contract import BLIP2
from blipstream_client import core, transport
from blipstream_client.answers import Generation, TextChunk, Trimmer
from blipstream_client.images import Images, image_files
from blipstream_client.options import DecodingOptions, check_names, question_prompt

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class AsyncTextStream(AsyncIterator[TextChunk]):
    """The chunks of one text, as the server generates them; the last one carries the finish reason.

    The request is sent when the first chunk is asked for. Leaving the stream early (:meth:`aclose`, the end of an
    ``async with`` block, dropping the last reference, cancelling the task that waits for a chunk) cancels the request
    on the server. ``anext`` raises a :class:`~blipstream.errors.ClientError` when the request fails.
    """

    def __init__(self, client: AsyncClient, start: Callable[[], Awaitable[Any]], timeout: float) -> None:
        self._client = client
        self._start = start
        self._call: Any = None
        self._begun = False
        self._timeout = timeout
        self._trimmer = Trimmer()
        self._complete = False
        self._closed = False

    async def __anext__(self) -> TextChunk:
        if self._closed:
            raise StopAsyncIteration
        response = await self._read()
        if response is grpc.aio.EOF:
            if not self._complete:
                raise core.incomplete(self._client.url)
            raise StopAsyncIteration
        if response.error_message:
            await self._await_end()
        chunk = self._trimmer.trim(core.decode_response(response, self._client.url))
        self._complete = self._complete or chunk.is_last
        return chunk

    async def _first(self) -> Any:
        """Send the request and wait for its first response; until that has come, it may be sent again."""
        self._loop = asyncio.get_running_loop()
        self._call = await self._start()
        if self._closed:  # while the image was read, or before another attempt
            self._call.cancel()
            raise StopAsyncIteration
        return await self._call.read()

    async def _read(self) -> Any:
        try:
            if not self._begun:
                response: Any = await tenacity.AsyncRetrying(**transport.RETRYING)(self._first)
                self._begun = True
                return response
            return await self._call.read()
        except grpc.RpcError as error:
            raise core.client_error(error, self._client.url, self._timeout) from error
        except asyncio.CancelledError:
            # grpcio raises it for a call that was cancelled, too, where it is not the task that is to end
            if self._closed:
                raise StopAsyncIteration from None
            if self._client.closed:
                raise core.closed(self._client.url) from None
            raise

    async def _await_end(self) -> None:
        """Read the call of a failed request to its end: see :mod:`~blipstream_client.transport` for why."""
        with contextlib.suppress(grpc.RpcError):
            while await self._call.read() is not grpc.aio.EOF:
                pass

    async def aclose(self) -> None:
        """End the stream; a server that is still generating stops."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:  # grpcio itself holds on to a call that is running
        if self._call is not None and not self._call.done():
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the call with it
                self._loop.call_soon_threadsafe(self._call.cancel)


class AsyncClient:
    """Sends images and prompts to a Blipstream server; for any number of tasks of the event loop that is running.

    Raises what :class:`blipstream_client.Client` raises.
    """

    def __init__(
        self,
        url: str = transport.DEFAULT_URL,
        *,
        model: str = BLIP2,
        timeout: float = transport.DEFAULT_TIMEOUT_S,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """Connect to ``url``, HOST:PORT of the server's gRPC endpoint (the connection is made with the first request).

        ``timeout`` in seconds holds for every request that does not have its own, waiting and retries included;
        ``credentials`` turn on TLS.
        """
        self.url = transport.check_url(url)
        self._model = model
        self._timeout = core.check_timeout(timeout)
        self._credentials = credentials
        self._channel: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._template: str | None = None
        self.closed = False
        """Whether :meth:`aclose` was called."""

    async def ready(self, *, timeout: float = 5.0) -> bool:
        """Whether the server answers within ``timeout`` seconds and its model is loaded."""
        ask = self._connected().unary_unary(
            transport.READY_METHOD,
            request_serializer=service_pb2.ModelReadyRequest.SerializeToString,
            response_deserializer=service_pb2.ModelReadyResponse.FromString,
        )
        try:
            request = service_pb2.ModelReadyRequest(name=self._model)
            return bool((await ask(request, timeout=core.check_timeout(timeout))).ready)
        except grpc.RpcError:
            return False

    async def generate(
        self, image: Images, prompt: str = "", *, timeout: float | None = None, **options: Unpack[DecodingOptions]
    ) -> Generation:
        """Generate the text that follows an image and a prompt; an empty prompt asks for a caption.

        A list of images are the frames of a video, for a model that reads several.
        """
        async with self._stream(image, prompt, dict(options), timeout, stream=False) as chunks:
            return Generation.join([chunk async for chunk in chunks])

    def stream(
        self, image: Images, prompt: str = "", *, timeout: float | None = None, **options: Unpack[DecodingOptions]
    ) -> AsyncTextStream:
        """Generate as :meth:`generate` does, and return the text piece by piece as it comes."""
        return self._stream(image, prompt, dict(options), timeout, stream=True)

    async def caption(
        self, image: Images, *, timeout: float | None = None, **options: Unpack[DecodingOptions]
    ) -> Generation:
        """Describe an image."""
        return await self.generate(image, timeout=timeout, **options)

    async def ask(
        self,
        image: Images,
        question: str,
        *,
        template: str | None = None,
        timeout: float | None = None,
        **options: Unpack[DecodingOptions],
    ) -> Generation:
        """Answer a question about an image.

        The question is put into ``template``, by default :meth:`question_template`; ``"{}"`` sends it as it is.
        """
        template = await self.question_template(timeout=timeout) if template is None else template
        return await self.generate(image, question_prompt(question, template), timeout=timeout, **options)

    async def question_template(self, *, timeout: float | None = None) -> str:
        """How the served checkpoint was shown questions, with ``{}`` in place of one; asked of the server once.

        It is BLIP-2's own where the server does not say.
        """
        if self._template is None:
            timeout = self._timeout if timeout is None else core.check_timeout(timeout)
            call = self._connected().unary_unary(
                transport.CONFIG_METHOD,
                request_serializer=service_pb2.ModelConfigRequest.SerializeToString,
                response_deserializer=service_pb2.ModelConfigResponse.FromString,
            )

            async def ask() -> str:
                return core.decode_template(await call(core.config_request(self._model), timeout=timeout))

            try:
                template: str = await tenacity.AsyncRetrying(**transport.RETRYING)(ask)
            except grpc.RpcError as error:
                template = core.default_template(error, self.url, timeout)
            self._template = template
        return self._template

    async def aclose(self) -> None:
        """Close the connection; requests that are running are cancelled."""
        self.closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def _stream(
        self, image: Images, prompt: str, options: dict[str, object], timeout: float | None, *, stream: bool
    ) -> AsyncTextStream:
        check_names(options)
        timeout = self._timeout if timeout is None else core.check_timeout(timeout)

        @functools.cache
        def encoded() -> service_pb2.ModelInferRequest:
            """The request, made once however often it is sent."""
            return core.encode_request(self._model, image_files(image), prompt, options, stream=stream)

        deadline = time.monotonic() + timeout

        async def start() -> Any:
            # reading a file, or compressing a Pillow image, would hold up the event loop
            request = await asyncio.to_thread(encoded)
            return self._method()(request, timeout=max(0.0, deadline - time.monotonic()))

        return AsyncTextStream(self, start, timeout)

    def _connected(self) -> Any:
        """The channel."""
        if self.closed:
            raise core.closed(self.url)
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # made here, because a channel belongs to the event loop that is running
            self._loop = loop
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.url, options=transport.channel_options(self.url))
            else:
                self._channel = grpc.aio.secure_channel(
                    self.url, self._credentials, options=transport.channel_options(self.url)
                )
        return self._channel

    def _method(self) -> Any:
        return self._connected().unary_stream(
            transport.METHOD,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )
