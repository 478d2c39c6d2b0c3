"""Metrics for Prometheus: vLLM's names with the prefix ``veneer``.

Adapters are named by labels; beyond `MAX_LABELS` of them, the rest is counted as "other", so that a metric stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from veneer.serve.engine.engine import Engine
from veneer.serve.engine.request import OTHER_TENANTS, Finished

MAX_LABELS = 100
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class ServeMetrics:
    """The metrics of one server."""

    def __init__(self, engine: Engine, jobs: Callable[[], Mapping[str, int]]) -> None:
        """``jobs`` counts the jobs by status."""
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine, jobs))

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"veneer:{name}", text, buckets=_SECONDS, registry=self._registry)

        self._first_token = histogram("time_to_first_token_seconds", "Seconds from arrival to the first token")
        self._between = histogram("inter_token_latency_seconds", "Mean seconds between the tokens of a request")
        self._total = histogram("e2e_request_latency_seconds", "Seconds from arrival to the end of a request")
        self._answers = Counter("veneer:http_responses", "Answers by status", ["status"], registry=self._registry)

    def finished(self, event: Finished) -> None:
        """Count a request that has ended."""
        timing, tokens = event.timing, event.usage.completion_tokens
        self._total.observe(max(0.0, timing.finished - timing.arrived))
        if timing.first_token is not None:
            self._first_token.observe(max(0.0, timing.first_token - timing.arrived))
            if tokens > 1:
                self._between.observe(max(0.0, timing.finished - timing.first_token) / (tokens - 1))

    def answered(self, status: int) -> None:
        """Count an answer."""
        self._answers.labels(str(status)).inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's counts when the metrics are asked for."""

    def __init__(self, engine: Engine, jobs: Callable[[], Mapping[str, int]]) -> None:
        self._engine = engine
        self._jobs = jobs

    def collect(self) -> Iterable[Any]:
        """The metric families."""
        found = self._engine.metrics()
        used = 1 - found.free_blocks / found.blocks if found.blocks else 0.0
        for name, text, value in (
            ("num_requests_running", "Requests that run", found.running),
            ("num_requests_waiting", "Requests that wait", found.waiting),
            ("kv_cache_usage_perc", "Share of the cache blocks in use", used),
            ("adapters_in_bank", "Adapters beside the base's layers", found.adapters_in_bank),
            ("adapters_in_memory", "Adapters in memory", found.adapters_in_memory),
            ("adapters_on_disk", "Adapters on the disk only", found.adapters_on_disk),
        ):
            yield GaugeMetricFamily(f"veneer:{name}", text, value)
        for name, text, count in (
            ("engine_steps", "Steps of the engine", found.steps),
            ("prefix_cache_hit_tokens", "Prompt tokens that were not computed again", found.cached_tokens),
            ("num_preemptions", "Requests that were stopped to be computed again", found.preemptions),
            ("adapter_loads", "Adapters that were read into memory", found.adapter_loads),
            ("adapter_evictions", "Adapters that left the bank or memory for others", found.adapter_evictions),
            ("engine_busy_seconds", "Seconds in steps", found.busy_seconds),
        ):
            yield CounterMetricFamily(f"veneer:{name}", text, count)
        yield _by_adapter(CounterMetricFamily, "prompt_tokens", "Prompt tokens by adapter", found.prompt_tokens)
        yield _by_adapter(
            CounterMetricFamily, "generation_tokens", "Generated tokens by adapter", found.generated_tokens
        )
        yield _by_adapter(
            GaugeMetricFamily, "lora_requests_waiting", "Waiting requests by adapter", found.waiting_by_adapter
        )
        resident = {status.name: float(status.place == "bank") for status in self._engine.adapters()}
        yield _by_adapter(GaugeMetricFamily, "adapter_resident", "1 for adapters beside the layers", resident)
        success = CounterMetricFamily(
            "veneer:request_success", "Requests by how they ended", labels=["finished_reason"]
        )
        for reason, number in found.finished.items():
            success.add_metric([reason], number)
        yield success
        jobs = GaugeMetricFamily("veneer:fine_tuning_jobs", "Jobs by status", labels=["status"])
        for status, number in self._jobs().items():
            jobs.add_metric([status], number)
        yield jobs


def _by_adapter(family: Any, name: str, text: str, counts: Mapping[str, float]) -> Any:
    """A family with a label for each adapter, the largest counts first; the base's is "base"."""
    made = family(f"veneer:{name}", text, labels=["adapter"])
    ordered = sorted(counts.items(), key=lambda entry: -entry[1])
    shown = dict(ordered[:MAX_LABELS])
    if rest := ordered[MAX_LABELS:]:  # an adapter may have the name of the rest
        shown[OTHER_TENANTS] = shown.get(OTHER_TENANTS, 0) + sum(count for _, count in rest)
    for adapter, count in shown.items():
        made.add_metric([adapter or "base"], count)
    return made
