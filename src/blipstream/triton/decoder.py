"""``blip2``: the decoupled model that generates text."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from blipstream.contract import TOKENIZER_FILE
from blipstream.decoding.loop import DecodeLoop, LoopConfig
from blipstream.decoding.text import Tokenizer
from blipstream.engines import load_decoder
from blipstream.errors import InvalidRequestError
from blipstream.instructions import InstructionEncoder
from blipstream.triton.calls import TritonCall
from blipstream.triton.images import ImageModels
from blipstream.triton.inputs import RequestParser
from blipstream.triton.lifeline import LIFELINE_VARIABLE, watch_lifeline
from blipstream.triton.metrics import MetricsPublisher, ServingMetrics, triton_family
from blipstream.triton.model import ModelFolder
from blipstream.triton.parameters import CANCEL_PARAMETER
from blipstream.triton.service import GenerationService


class DecoderModel:
    """Owns the decoder, the service around it and the publisher of its metrics."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load tokenizer and decoder, and start to serve."""
        folder = ModelFolder(args)
        manifest, config = folder.manifest, folder.config
        os.nice(config.decode_niceness)  # the engine's threads, which come next, have that of their creator
        tokenizer = Tokenizer.load(folder.path / TOKENIZER_FILE)
        self._decoder = load_decoder(manifest.decoder, folder.load_engine, config.prefix_bytes)
        capacity = manifest.decoder.max_sequences

        def make_loop(metrics: ServingMetrics) -> DecodeLoop:
            return DecodeLoop(
                self._decoder,
                tokenizer,
                eos_token_ids=manifest.generation.eos_token_ids,
                image_token_id=manifest.generation.image_token_id,
                config=LoopConfig(max_waiting=config.queue_size + capacity, prefill_budget=config.prefill_budget),
                observer=metrics,
            )

        self._service = GenerationService(
            RequestParser(manifest, config, InstructionEncoder.load(folder.path, manifest)),
            tokenizer,
            manifest.generation.empty_prompt_ids,
            ImageModels(),
            make_loop,
            config,
            capacity,
        )
        self._publisher = MetricsPublisher(self._service.metrics, self._gauges, triton_family, folder.labels)
        self._service.start()
        self._publisher.start()
        self._grace = config.stop_grace
        self._watch_lifeline()

    def execute(self, requests: Sequence[Any]) -> None:
        """Hand the requests to the service, which answers them by their response senders."""
        for request in requests:
            call = TritonCall(request)
            if CANCEL_PARAMETER in call.parameters:
                self._cancel(call, str(call.parameters[CANCEL_PARAMETER]))
            else:
                self._service.accept(call)

    def _cancel(self, call: TritonCall, name: str) -> None:
        if self._service.cancel(name):
            call.respond(None, final=True)
        else:
            call.fail(InvalidRequestError(f"no request that has not ended is called {name[:64]!r}"))

    def finalize(self) -> None:
        """Answer whoever still waits, and stop."""
        self._service.close(self._grace)
        self._publisher.close()
        self._decoder.close()

    def _gauges(self) -> dict[str, float]:
        return {**self._service.gauges(), **self._decoder.prefix_gauges()}

    def _watch_lifeline(self) -> None:
        """Stop with the launcher: Triton unloads a decoupled model only when all its requests are answered."""
        if LIFELINE_VARIABLE in os.environ:
            descriptor = int(os.environ[LIFELINE_VARIABLE])
            stop = threading.Thread(
                target=watch_lifeline,
                args=(descriptor, lambda: self._service.close(self._grace)),
                name="lifeline",
                daemon=True,
            )
            stop.start()
