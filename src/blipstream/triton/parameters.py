"""The parameters of a request, beside its inputs.

Triton's ``generate`` makes a parameter of each JSON key that names no input, and its other endpoints pass on what a
client adds. An option that nobody reads would be ignored without a word, so each name is either known here or refused.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from blipstream.contract import BLIP2_INPUTS
from blipstream.errors import InvalidRequestError

CALL_PARAMETER = "blipstream_call"
"""Names a request with a random string, by which it can be cancelled."""
CANCEL_PARAMETER = "blipstream_cancel"
"""Cancels the request of that name, in a request of its own: Triton passes no cancellation on to a BLS request."""
MIN_NAME = 16
"""Characters of a request's name at least: who does not know it must not guess it."""

INPUT_NAMES = frozenset(spec.name for spec in BLIP2_INPUTS)
_PROTOCOL = frozenset(
    {"id", "priority", "timeout", "sequence_id", "sequence_start", "sequence_end", "binary_data_output"}
)
"""The inference protocol's own, which ``generate`` passes on as well."""
_HEADERS = frozenset(
    (
        *("accept", "authorization", "b3", "baggage", "connection", "cookie", "date", "expect", "forwarded", "from"),
        *("host", "origin", "pragma", "referer", "te", "traceparent", "tracestate", "via"),
    )
)
"""HTTP headers of one word. Triton makes parameters of headers, where it was started to do so."""

_ELSEWHERE = {
    "text_input": ("prompt", "text", "inputs", "input", "question", "query", "instruction", "content"),
    "image": ("images", "image_url", "image_base64", "image_data", "img", "picture", "photo", "file"),
    "image_input": ("pixel_values", "pixels"),
    "image and text_input": ("messages",),
    "max_tokens": (
        *("max_new_tokens", "max_length", "max_output_tokens", "max_completion_tokens", "max_generated_tokens"),
        *("request_output_len", "num_predict", "n_predict", "length"),
    ),
    "temperature, top_k or top_p": ("do_sample", "sampling", "sampling_parameters", "sampling_params"),
    "min_tokens": ("min_new_tokens", "min_output_tokens", "ignore_eos"),
    "beam_width": ("num_beams", "beams", "beam_size", "num_return_sequences", "n", "best_of"),
    "random_seed": ("seed",),
    "stop_words": ("stop", "stop_sequences", "stop_strings", "stop_token_ids"),
    "bad_words": ("bad_words_ids", "bad_words_list", "suppress_tokens"),
    "return_log_probs": ("logprobs", "log_probs", "return_logprobs", "output_scores"),
    "stream": ("streaming", "stream_options"),
    "repetition_penalty": ("repeat_penalty",),
}
"""The inputs to use, and what other servers call them."""


def _plain(name: str) -> str:
    return name.casefold().replace("_", "").replace("-", "").replace(".", "")


_RIGHT_NAMES = {_plain(name): name for name in sorted(INPUT_NAMES)} | {
    _plain(name): right for right, names in _ELSEWHERE.items() for name in names
}


def unknown_option(name: str) -> InvalidRequestError:
    """The error for an option that does not exist, with the one that was probably meant."""
    shown = name if len(name) <= 64 else name[:64] + "..."
    nearest = difflib.get_close_matches(_plain(shown), _RIGHT_NAMES, 1, 0.75)
    if nearest:
        return InvalidRequestError(f"there is no option called {shown!r}, and {_RIGHT_NAMES[nearest[0]]} was expected")
    expected = ", ".join(spec.name for spec in BLIP2_INPUTS)
    return InvalidRequestError(f"there is no option called {shown!r}, and those expected are {expected}")


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """See that every parameter means something.

    Raises:
        InvalidRequestError: a parameter is unknown, or has a value that it cannot have.
    """
    for name in parameters:
        if name in INPUT_NAMES:
            raise InvalidRequestError(f"{name} must be an input, but it was given as a parameter")
        if not _is_known(name):
            raise unknown_option(name)
    timeout = parameters.get("timeout", 0)
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool) or not 0 <= timeout < math.inf:
        raise InvalidRequestError(f"timeout must be a number of microseconds of at least 0, but it is {timeout!r}")
    call = parameters.get(CALL_PARAMETER)
    if call is not None and not (isinstance(call, str) and len(call) >= MIN_NAME):
        raise InvalidRequestError(
            f"{CALL_PARAMETER} must be a random string of at least {MIN_NAME} characters, but it is {call!r}"
        )


def timeout_seconds(microseconds: int, parameters: Mapping[str, Any]) -> float:
    """A request's timeout: the protocol's own, in microseconds, or the parameter that ``generate`` makes of it."""
    value = microseconds or parameters.get("timeout", 0)
    return value / 1e6 if isinstance(value, (int, float)) and 0 < value < math.inf else 0.0


def _is_known(name: str) -> bool:
    if name in _PROTOCOL or name in (CALL_PARAMETER, CANCEL_PARAMETER) or name.startswith("triton_"):
        return True
    header = "-" in name or name.casefold() in _HEADERS
    return header and _plain(name) not in _RIGHT_NAMES
