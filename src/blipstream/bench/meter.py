"""What a server counts itself: Triton's statistics of its models, and the counters of Blipstream's metrics."""

from __future__ import annotations

import http.client
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blipstream.errors import ServerUnavailableError

_PREFIX = "blipstream_"
_TIMEOUT_S = 10.0
_PUBLISHED_S = 0.5
"""Within which a server has published what it counted."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class ModelTotals:
    """What Triton has counted of a model since the server started."""

    inferences: int
    executions: int
    queue_ns: int
    compute_ns: int

    def since(self, before: ModelTotals) -> ModelTotals:
        """What has come about since ``before``."""
        own, old = self.__dict__, before.__dict__
        return ModelTotals(**{name: own[name] - old[name] for name in own})

    def figures(self) -> dict[str, float]:
        """Mean batch, and milliseconds of an inference in the queue and in the model."""
        return {
            "inferences": self.inferences,
            "mean_batch": round(self.inferences / self.executions, 3),
            "mean_queue_ms": round(self.queue_ns / self.inferences / 1e6, 3),
            "mean_compute_ms": round(self.compute_ns / self.inferences / 1e6, 3),
        }


@dataclass(frozen=True)
class Reading:
    """All totals at one moment: of each model, and of each counter."""

    models: Mapping[str, ModelTotals]
    counters: Mapping[str, float]

    def since(self, before: Reading) -> dict[str, Any]:
        """Figures of each model that has run meanwhile, and by how much each counter has grown.

        ``{"restarted": True}`` if the server has counted less than before.
        """
        if self._total() < before._total():
            return {"restarted": True}
        grown = {name: own.since(before.models[name]) for name, own in self.models.items() if name in before.models}
        return {
            "models": {name: own.figures() for name, own in grown.items() if own.inferences and own.executions},
            "counters": {name: round(value - before.counters.get(name, 0), 4) for name, value in self.counters.items()},
        }

    def _total(self) -> float:
        return sum(own.executions for own in self.models.values()) + sum(self.counters.values())


class Meter:
    """Reads a server's totals, where it can be asked.

    Args:
        triton_url: ``HOST:PORT`` of gRPC of a Triton server.
        metrics_url: of the metrics of a Blipstream server.
    """

    def __init__(self, triton_url: str | None, metrics_url: str | None) -> None:
        self._triton_url = triton_url
        self._metrics_url = metrics_url

    def read(self) -> Reading:
        """The totals now.

        Raises:
            ClientError: there is no such server.
            ModuleNotFoundError: the parser of metrics is not installed.
        """
        models = _models(self._triton_url) if self._triton_url else {}
        return Reading(models, _counters(self._metrics_url) if self._metrics_url else {})


def _models(url: str) -> dict[str, ModelTotals]:
    import grpc
    from blipstream_client.core import client_error
    from blipstream_client.transport import channel_options
    from tritonclient.grpc import service_pb2

    try:
        with grpc.insecure_channel(url, options=channel_options(url)) as channel:
            ask = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelStatistics",
                request_serializer=service_pb2.ModelStatisticsRequest.SerializeToString,
                response_deserializer=service_pb2.ModelStatisticsResponse.FromString,
            )
            statistics: Any = ask(service_pb2.ModelStatisticsRequest(), timeout=_TIMEOUT_S)
    except grpc.RpcError as error:
        raise client_error(error, url, _TIMEOUT_S) from error
    return {
        model.name: ModelTotals(
            model.inference_count,
            model.execution_count,
            model.inference_stats.queue.ns,
            model.inference_stats.compute_infer.ns,
        )
        for model in statistics.model_stats
    }


def _counters(url: str) -> dict[str, float]:
    """Every counter of Blipstream, by its name without the prefix; the sum of all labels."""
    from prometheus_client.parser import text_string_to_metric_families

    time.sleep(_PUBLISHED_S)
    try:
        with _DIRECT.open(url, timeout=_TIMEOUT_S) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
    except http.client.HTTPException:
        raise ServerUnavailableError(
            f"the metrics at {url} cannot be read: what answers there speaks no HTTP"
        ) from None
    except (OSError, ValueError) as error:
        raise ServerUnavailableError(f"the metrics at {url} cannot be read: {error}") from error
    counters = {
        family.name.removeprefix(_PREFIX): sum(sample.value for sample in family.samples)
        for family in families
        if family.type == "counter" and family.name.startswith(_PREFIX)
    }
    if not counters:
        raise ServerUnavailableError(f"there are no metrics of a Blipstream server at {url}: does it end in /metrics?")
    return counters
