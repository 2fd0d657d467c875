"""The server's numbers for Prometheus and what reads its format (OpenMetrics where it is asked for).

They are read off the tallies, the service and the engine when somebody asks; nothing here is on a request's way. No
label's values grow with the traffic: no ids, prompts, keys or paths.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from .. import __version__
from ..engine import Engine
from ..jobs.record import FINISHED, UNFINISHED, JobKind
from .service import Service
from .tallies import Distribution, RequestTally

KINDS: tuple[JobKind, ...] = ("image", "video")
PASS_BOUNDS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Everything that `GET /metrics` tells. Lives on the event loop."""

    def __init__(self, engine: Engine, service: Service, requests: RequestTally) -> None:
        self._engine = engine
        self._service = service
        self._requests = requests
        self._began = time.monotonic()
        self._process = ProcessCollector(registry=None)

    async def page(self, accept: str) -> tuple[bytes, str]:
        """Return all numbers in the format that an ``Accept`` header prefers, and its content type."""
        encode, content_type = choose_encoder(accept)
        numbers = _Numbers([*self._all(), *self._process.collect()])
        # Writing a thousand samples down takes many times what another request should wait.
        return await asyncio.to_thread(encode, numbers), content_type

    def _all(self) -> Iterator[Metric]:
        yield from self._server()
        yield from self._http()
        yield from self._jobs_at_hand()
        yield from self._jobs_over()
        yield from self._workers()

    def _server(self) -> Iterator[Metric]:
        status, card = self._engine.status, self._engine.card
        build = {"version": __version__, "python": platform.python_version()}
        yield InfoMetricFamily("photogram_build", "The running version.", build)
        if card is not None:
            facts = {"model": card.name, "pipeline": card.pipeline_class, "device": card.device_name}
            yield InfoMetricFamily("photogram_model", "The served model.", facts)
        uptime_s = time.monotonic() - self._began
        yield GaugeMetricFamily("photogram_uptime_seconds", "Seconds since the server's start.", uptime_s)
        is_ready = status.state == "ready" and not self._service.is_draining
        yield GaugeMetricFamily("photogram_ready", "1 while a request would run now, as /ready says, else 0.", is_ready)
        yield CounterMetricFamily(
            "photogram_worker_restarts", "Workers that died or were ended, and were replaced.", status.num_restarts
        )

    def _http(self) -> Iterator[Metric]:
        tally = self._requests
        yield GaugeMetricFamily("photogram_http_requests_active", "Requests being answered.", tally.num_active)
        ended = CounterMetricFamily(
            "photogram_http_requests", "Requests answered.", labels=("route", "method", "status")
        )
        for (route, method, status), num in tally.num_ended.items():
            ended.add_metric((route, method, str(status)), num)
        yield ended
        seconds = HistogramMetricFamily(
            "photogram_http_request_duration_seconds",
            "Seconds from a request's head to the end of its answer.",
            labels=("route", "method"),
        )
        for (route, method), distribution in tally.seconds.items():
            _add(seconds, (route, method), distribution)
        yield seconds

    def _jobs_at_hand(self) -> Iterator[Metric]:
        records = self._service.unfinished()
        numbers = Counter((record.kind, record.state) for record in records)
        at_hand = GaugeMetricFamily("photogram_jobs", "Jobs accepted and not finished.", labels=("kind", "state"))
        for kind in KINDS:
            for state in UNFINISHED:
                at_hand.add_metric((kind, state), numbers[kind, state])
        yield at_hand
        now = time.time()
        queued_s = (max(0.0, now - record.created_at) for record in records if record.state == "queued")
        yield GaugeMetricFamily(
            "photogram_queue_oldest_seconds",
            "Age of the oldest job that waits for its start.",
            max(queued_s, default=0),
        )

    def _jobs_over(self) -> Iterator[Metric]:
        tally = self._service.tally
        accepted = CounterMetricFamily(
            "photogram_jobs_accepted", "Jobs accepted, or taken up from an earlier server.", labels=("kind",)
        )
        finished = CounterMetricFamily("photogram_jobs_finished", "Jobs by their end.", labels=("kind", "state"))
        steps = CounterMetricFamily("photogram_steps", "Denoising steps made.", labels=("kind",))
        for kind in KINDS:
            accepted.add_metric((kind,), tally.num_accepted[kind])
            steps.add_metric((kind,), tally.num_steps[kind])
            for state in FINISHED:
                finished.add_metric((kind, state), tally.num_finished[kind, state])
        failures = CounterMetricFamily("photogram_job_failures", "Failed jobs by their error.", labels=("kind", "code"))
        for (kind, code), num in tally.num_failures.items():
            failures.add_metric((kind, code), num)
        seconds = HistogramMetricFamily(
            "photogram_job_duration_seconds", "Seconds from a job's acceptance to its file.", labels=("kind",)
        )
        for kind, distribution in tally.seconds.items():
            _add(seconds, (kind,), distribution)
        phases = HistogramMetricFamily(
            "photogram_job_phase_seconds",
            "Seconds that jobs spent in each phase, waiting for their turn included.",
            labels=("kind", "phase"),
        )
        for (kind, stage), distribution in tally.stage_seconds.items():
            _add(phases, (kind, stage), distribution)
        yield from (accepted, finished, failures, seconds, phases, steps)

    def _workers(self) -> Iterator[Metric]:
        passes = HistogramMetricFamily(
            "photogram_pass_calls", "Calls that ran as one forward pass.", labels=("worker", "module")
        )
        switches = CounterMetricFamily(
            "photogram_lora_switches", "Changes of the LoRAs merged into a module's weights.", labels=("worker",)
        )
        memory = GaugeMetricFamily(
            "photogram_device_memory_bytes", "Memory of the worker's device.", labels=("worker", "kind")
        )
        for index, figures in enumerate(self._engine.figures):
            worker = str(index)
            sizes: dict[str, Distribution] = {}
            for (module, num_calls), num in figures.passes.items():
                sizes.setdefault(module, Distribution(PASS_BOUNDS)).add(num_calls, num)
            for module, distribution in sizes.items():
                _add(passes, (worker, module), distribution)
            switches.add_metric((worker,), figures.num_lora_switches)
            if figures.memory is not None:
                memory.add_metric((worker, "allocated"), figures.memory.allocated_bytes)
                memory.add_metric((worker, "reserved"), figures.memory.reserved_bytes)
                memory.add_metric((worker, "total"), figures.memory.total_bytes)
        yield from (passes, switches, memory)


class _Numbers(Collector):
    """The numbers of one moment."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _add(family: HistogramMetricFamily, labels: Sequence[str], distribution: Distribution) -> None:
    """Add a histogram, each of whose buckets counts all that is at most its bound."""
    names = (*(str(float(bound)) for bound in distribution.bounds), "+Inf")
    buckets = list(zip(names, accumulate(distribution.counts), strict=True))
    family.add_metric(labels, buckets, distribution.sum)
