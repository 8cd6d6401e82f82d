"""The one exception tree of Blipstream.

::

    BlipstreamError
    ├── InvalidRequestError        the client's request is wrong; nothing was run
    │   ├── InvalidImageError      the image cannot be decoded, or is over a limit
    │   └── PromptTooLongError     soft tokens + prompt are too many, or leave no room
    ├── RequestTimeoutError        the request waited longer than its timeout
    ├── ServerBusyError            the waiting queue is full
    ├── BundleError                a bundle is missing, incomplete or of another revision
    ├── CheckpointError            a checkpoint is missing, damaged or inconsistent
    │   └── UnsupportedCheckpointError   a checkpoint of a kind that Blipstream does not serve
    ├── ParityError                the exported graphs do not reproduce the checkpoint
    ├── EngineError                an inference engine failed
    ├── KernelError                a fused kernel cannot be compiled as asked
    │   └── KernelInputError       a fused kernel was given tensors or options that it does not take
    ├── ServerStartError           tritonserver could not be started, or did not become ready
    └── ClientError                what a client sees: the server refused, failed or is out of reach
        ├── RequestRefusedError    the server found the request invalid (an InvalidRequestError as well)
        ├── ServerUnavailableError the server is out of reach, not ready or too busy
        └── DeadlineExceededError  no complete answer within the client's timeout

Every message is one sentence that names what was given and what was expected.
"""

from __future__ import annotations


class BlipstreamError(Exception):
    """Base class of every error that Blipstream raises on purpose."""


class InvalidRequestError(BlipstreamError, ValueError):
    """The request is malformed: a parameter out of range, a missing input, a wrong type."""


class InvalidImageError(InvalidRequestError):
    """The image cannot be decoded, or exceeds a limit on bytes or pixels."""


class PromptTooLongError(InvalidRequestError):
    """Soft tokens and prompt are more than the model reads, or leave no room for a generated token."""


class RequestTimeoutError(BlipstreamError, TimeoutError):
    """The request waited for a slot longer than its timeout."""


class ServerBusyError(BlipstreamError):
    """The queue of waiting requests is full."""


class BundleError(BlipstreamError):
    """A bundle is missing, incomplete, damaged or of an unknown revision."""


class CheckpointError(BlipstreamError):
    """A checkpoint is missing, damaged or inconsistent with its configuration."""


class UnsupportedCheckpointError(CheckpointError):
    """A checkpoint of an architecture or configuration that Blipstream does not serve."""


class ParityError(BlipstreamError):
    """The exported graphs do not reproduce the checkpoint within the thresholds."""


class EngineError(BlipstreamError):
    """An inference engine failed to load or to run a graph."""


class KernelError(BlipstreamError):
    """A fused kernel cannot be compiled for an architecture, or does not fit it."""


class KernelInputError(KernelError, ValueError):
    """A fused kernel was given a tensor or an option that it does not take; nothing was launched."""


class ServerStartError(BlipstreamError):
    """``tritonserver`` could not be started or did not become ready in time."""


class ClientError(BlipstreamError):
    """The server refused or failed a request, or could not be reached."""


class RequestRefusedError(ClientError, InvalidRequestError):
    """The server found the request invalid; sending it again cannot succeed."""


class ServerUnavailableError(ClientError):
    """The server is out of reach, not ready or too busy; the transport's retries are used up."""


class DeadlineExceededError(ClientError, TimeoutError):
    """The client's timeout passed before the answer was complete; the server was told to stop."""
