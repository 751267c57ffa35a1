"""Metrics in Prometheus form: requests as the front answers them, and the counts in the replies of replicas."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from fora_trt.serve.batches import Counts

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Upper ends of the buckets of request durations."""

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Upper ends of the buckets of batch sizes."""

NOTHING = Counts({}, 0.0, 0.0, 0, 0, 0)


@dataclass
class Latest:
    """The newest counts of one replica; `number` rises with each of its answers."""

    model: str
    number: int
    counts: Counts


@dataclass(eq=False)  # registries put it in dictionaries
class Replicas(Collector):
    """Sums the counts of all replicas that ever answered, so that no counter falls when a replica dies.

    `images` has the number of images that each model owes the front. No more than these run, whatever the latest reply
    of a replica says that died since.
    """

    models: Iterable[str]
    images: dict[str, int] = field(default_factory=dict)
    latest: dict[str, Latest] = field(default_factory=dict)

    def keep(self, replica: str, latest: Latest) -> None:
        """Keep the counts of an answer unless a newer one came before it."""
        known = self.latest.get(replica)
        if known is None or known.number < latest.number:
            self.latest[replica] = latest

    def of(self, model: str) -> Counts:
        """The sum over the replicas of a model."""
        total = NOTHING
        for one in self.latest.values():
            if one.model == model:
                total = added(total, one.counts)
        return total

    def collect(self) -> Iterable[Metric]:
        """The metrics, read at each scrape."""
        pictures = CounterMetricFamily("fora_pictures", "Pictures made.", labels=["model"])
        seconds = CounterMetricFamily("fora_step_seconds", "Seconds in steps, by kind.", labels=["model", "kind"])
        sizes = HistogramMetricFamily("fora_batch_size", "Images that a full step computed.", labels=["model"])
        queue = GaugeMetricFamily("fora_images_in_progress", "Images that wait or run.", labels=["model", "state"])
        for model in self.models:
            counts = self.of(model)
            open_now = self.images.get(model, 0)
            running = min(counts.running, open_now)
            queue.add_metric([model, "running"], running)
            queue.add_metric([model, "waiting"], open_now - running)
            pictures.add_metric([model], counts.pictures)
            seconds.add_metric([model, "full"], counts.full_seconds)
            seconds.add_metric([model, "reuse"], counts.reuse_seconds)
            sizes.add_metric([model], *_histogram(counts.batches))
        return pictures, seconds, sizes, queue


def added(one: Counts, other: Counts) -> Counts:
    """The sum of two counts."""
    sizes = {*one.batches, *other.batches}
    return Counts(
        {size: one.batches.get(size, 0) + other.batches.get(size, 0) for size in sizes},
        one.full_seconds + other.full_seconds,
        one.reuse_seconds + other.reuse_seconds,
        one.pictures + other.pictures,
        one.waiting + other.waiting,
        one.running + other.running,
    )


def _histogram(batches: dict[int, int]) -> tuple[list[tuple[str, float]], float]:
    """Cumulative buckets and the sum of all sizes."""
    ends = [*SIZES, float("inf")]
    buckets = [
        (
            "+Inf" if end == float("inf") else str(float(end)),
            float(sum(k for size, k in batches.items() if size <= end)),
        )
        for end in ends
    ]
    return buckets, float(sum(size * k for size, k in batches.items()))


class Metrics:
    """All metrics of a server, in a registry of their own."""

    def __init__(self, models: Iterable[str]) -> None:
        models = [*models]
        self.registry = CollectorRegistry()
        self.replicas = Replicas(models)
        labels = ["route", "model", "status"]
        own = self.registry
        self.requests = Counter("fora_requests", "Requests answered; 499: the client went away.", labels, registry=own)
        self.seconds = Histogram(
            "fora_request_seconds", "Seconds from a request to its answer.", ["model"], buckets=SECONDS, registry=own
        )
        self.open = Gauge("fora_requests_in_progress", "Requests that wait or run.", ["model"], registry=own)
        own.register(self.replicas)
        for model in models:
            self.seconds.labels(model)
            self.open.labels(model)

    def wait_for(self, model: str, images: int, requests: int = 1) -> None:
        """Add a request and its images to those in progress; negative numbers take them off."""
        self.open.labels(model).inc(requests)
        self.replicas.images[model] = self.replicas.images.get(model, 0) + images

    def text(self) -> bytes:
        """The text form of Prometheus."""
        return generate_latest(self.registry)
