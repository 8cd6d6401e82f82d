"""The synchronous client."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
import tenacity
from tritonclient.grpc import service_pb2

from blipstream.contract import BLIP2
from blipstream_client import core, transport
from blipstream_client.answers import Generation, TextChunk, Trimmer
from blipstream_client.images import Images, image_files
from blipstream_client.options import DecodingOptions, question_prompt

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class TextStream(Iterator[TextChunk]):
    """The chunks of one text, as the server generates them; the last one carries the finish reason.

    Leaving it early (:meth:`close`, the end of a ``with`` block, dropping the last reference) cancels the request on
    the server. ``next`` raises a :class:`~blipstream.errors.ClientError` when the request fails.
    """

    def __init__(self, send: Callable[[], Any], url: str, timeout: float) -> None:
        self._call: Any = None
        self._send = send
        self._tried = False
        self._begun = False
        self._url = url
        self._timeout = timeout
        self._trimmer = Trimmer()
        self._complete = False
        self._closed = False
        self._call = send()

    def __next__(self) -> TextChunk:
        try:
            response = next(self._call) if self._begun else self._first()
        except StopIteration:
            if not self._complete:
                raise core.incomplete(self._url) from None
            raise
        except grpc.RpcError as error:
            if self._closed:
                raise StopIteration from None
            raise core.client_error(error, self._url, self._timeout) from error
        if response.error_message:
            self._await_end()
        chunk = self._trimmer.trim(core.decode_response(response, self._url))
        self._complete = self._complete or chunk.is_last
        return chunk

    def _first(self) -> Any:
        """The first response; until it has come, a call may be sent again."""
        response = tenacity.Retrying(**transport.RETRYING)(self._try)
        self._begun = True
        return response

    def _try(self) -> Any:
        if self._closed:
            raise StopIteration
        if self._tried:
            self._call = self._send()
        self._tried = True
        return next(self._call)

    def _await_end(self) -> None:
        """Read the call of a failed request to its end: see :mod:`~blipstream_client.transport` for why."""
        with contextlib.suppress(grpc.RpcError):
            for _ in self._call:
                pass

    def close(self) -> None:
        """End the stream; a server that is still generating stops. May be called by another thread."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:  # grpcio itself holds on to a call that is running
        self.close()


class Client:
    """Sends images and prompts to a Blipstream server; may be shared by any number of threads.

    Every method raises :class:`~blipstream.errors.InvalidRequestError` for what is wrong with the request (its
    subclass ``RequestRefusedError`` when the server found out), ``ServerUnavailableError`` when the server is out of
    reach or too busy, ``DeadlineExceededError`` after ``timeout`` seconds, and their base ``ClientError`` for any other
    failure of the server; ``TypeError`` for an option that does not exist.
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
        if credentials is None:
            self._channel = grpc.insecure_channel(url, options=transport.channel_options(url))
        else:
            self._channel = grpc.secure_channel(url, credentials, options=transport.channel_options(url))
        self._call = self._channel.unary_stream(
            transport.METHOD,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )
        self._config = self._channel.unary_unary(
            transport.CONFIG_METHOD,
            request_serializer=service_pb2.ModelConfigRequest.SerializeToString,
            response_deserializer=service_pb2.ModelConfigResponse.FromString,
        )
        self._template: str | None = None
        self._ready = self._channel.unary_unary(
            transport.READY_METHOD,
            request_serializer=service_pb2.ModelReadyRequest.SerializeToString,
            response_deserializer=service_pb2.ModelReadyResponse.FromString,
        )

    def ready(self, *, timeout: float = 5.0) -> bool:
        """Whether the server answers within ``timeout`` seconds and its model is loaded."""
        try:
            request = service_pb2.ModelReadyRequest(name=self._model)
            return bool(self._ready(request, timeout=core.check_timeout(timeout)).ready)
        except grpc.RpcError:
            return False
        except ValueError as error:
            raise core.closed(self.url) from error

    def generate(
        self, image: Images, prompt: str = "", *, timeout: float | None = None, **options: Unpack[DecodingOptions]
    ) -> Generation:
        """Generate the text that follows an image and a prompt; an empty prompt asks for a caption.

        A list of images are the frames of a video, for a model that reads several.
        """
        with self._start(image, prompt, dict(options), timeout, stream=False) as chunks:
            return Generation.join(list(chunks))

    def stream(
        self, image: Images, prompt: str = "", *, timeout: float | None = None, **options: Unpack[DecodingOptions]
    ) -> TextStream:
        """Generate as :meth:`generate` does, and return the text piece by piece as it comes."""
        return self._start(image, prompt, dict(options), timeout, stream=True)

    def caption(self, image: Images, *, timeout: float | None = None, **options: Unpack[DecodingOptions]) -> Generation:
        """Describe an image."""
        return self.generate(image, timeout=timeout, **options)

    def ask(
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
        template = self.question_template(timeout=timeout) if template is None else template
        return self.generate(image, question_prompt(question, template), timeout=timeout, **options)

    def question_template(self, *, timeout: float | None = None) -> str:
        """How the served checkpoint was shown questions, with ``{}`` in place of one; asked of the server once.

        It is BLIP-2's own where the server does not say.
        """
        if self._template is None:
            timeout = self._timeout if timeout is None else core.check_timeout(timeout)
            try:
                retrying = tenacity.Retrying(**transport.RETRYING)
                response = retrying(self._config, core.config_request(self._model), timeout=timeout)
                self._template = core.decode_template(response)
            except grpc.RpcError as error:
                self._template = core.default_template(error, self.url, timeout)
            except ValueError as error:  # as in _start
                raise core.closed(self.url) from error
        return self._template

    def close(self) -> None:
        """Close the connection; requests that are running are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start(
        self, image: Images, prompt: str, options: dict[str, object], timeout: float | None, *, stream: bool
    ) -> TextStream:
        request = core.encode_request(self._model, image_files(image), prompt, options, stream=stream)
        timeout = self._timeout if timeout is None else core.check_timeout(timeout)
        deadline = time.monotonic() + timeout
        try:
            return TextStream(
                lambda: self._call(request, timeout=max(0.0, deadline - time.monotonic())), self.url, timeout
            )
        except ValueError as error:  # grpcio's way of saying that the channel was closed
            raise core.closed(self.url) from error
