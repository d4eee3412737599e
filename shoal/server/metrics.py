"""Numbers for Prometheus, under the names that dashboards made for vLLM know (its `v1/metrics/loggers.py`, 0.32).

Counters of the engine are read when they are asked for; what a request experienced is observed when it ends. Every number
lives in a registry of this server, so that two servers in one process do not mix.
"""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TIME_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 300, 600)
TOKEN_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)

Number = float | tuple[str, dict[str, float]]
"""A number, or the name of a label and a number for each of its values."""
EngineNumbers = Callable[[], dict[str, Number]]
"""Current numbers by vLLM's names without prefix; those that end in `_total` are counters."""


class Metrics:
    """The metrics of one served model."""

    def __init__(self, model_name: str, engine_numbers: EngineNumbers) -> None:
        self.registry = CollectorRegistry()
        self.model_name = model_name
        self.registry.register(_EngineCollector(model_name, engine_numbers))
        label = ("model_name",)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"vllm:{name}", text, label, registry=self.registry, buckets=buckets)
            return made.labels(model_name)

        self._first_token = histogram("time_to_first_token_seconds", "From request to first token.", TIME_BUCKETS_S)
        self._between = histogram("inter_token_latency_seconds", "Between two tokens of a sample.", TOKEN_BUCKETS_S)
        self._whole = histogram("e2e_request_latency_seconds", "From request to last token.", TIME_BUCKETS_S)
        self._finished = Counter(
            "vllm:request_success", "Samples by how they ended.", (*label, "finished_reason"), registry=self.registry
        )
        self._responses = Counter(
            "shoal:http_responses", "Responses by route and status.", ("route", "status"), registry=self.registry
        )
        self._joules = Counter("shoal:energy_joules", "Energy of all answers, see usage.", registry=self.registry)
        self._cost = Counter("shoal:cost_usd", "What all answers cost by the price table.", registry=self.registry)

    def count_request(self, route: str, status: int) -> None:
        """A response was sent; status 0 is a client that left before."""
        self._responses.labels(route, str(status)).inc()

    def observe_first_token(self, seconds: float) -> None:
        """A sample's first token came."""
        self._first_token.observe(seconds)

    def observe_between(self, seconds: float) -> None:
        """Another token came, this long after the one before."""
        self._between.observe(seconds)

    def observe_end(self, seconds: float, reasons: Iterable[str], joules: float, cost_usd: float) -> None:
        """A request ended."""
        self._whole.observe(seconds)
        for reason in reasons:
            self._finished.labels(self.model_name, reason).inc()
        self._joules.inc(joules)
        self._cost.inc(cost_usd)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Reads the engine when Prometheus asks."""

    def __init__(self, model_name: str, numbers: EngineNumbers) -> None:
        self.model_name, self.numbers = model_name, numbers

    def collect(self) -> Iterable[Metric]:
        """One family per number."""
        for name, value in self.numbers().items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            label, values = value if isinstance(value, tuple) else (None, {"": value})
            labels = ("model_name",) if label is None else ("model_name", label)
            family = kind(f"vllm:{name.removesuffix('_total')}", name.replace("_", " "), labels=labels)
            for which, number in values.items():
                family.add_metric((self.model_name, which)[: len(labels)], number)
            yield family
