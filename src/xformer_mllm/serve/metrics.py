"""What `/metrics` shows, in Prometheus' format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "xformer_requests", "HTTP requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "xformer_request_seconds", "Seconds until the last byte of a response.", ["route"], registry=self.registry
        )
        self.waiting = Gauge("xformer_waiting", "Requests that wait for the models.", registry=self.registry)
        self.rows = Histogram(
            "xformer_batch_rows",
            "Answers generated together.",
            registry=self.registry,
            buckets=[1, 2, 4, 8, 16, 32, 64],
        )
        self.images_encoded = Counter("xformer_images_encoded", "Images encoded.", registry=self.registry)
        self.images_reused = Counter(
            "xformer_images_reused", "Questions about an image that was encoded before.", registry=self.registry
        )
        self.prompt_tokens = Counter(
            "xformer_prompt_tokens", "Tokens of prompts, with the images'.", registry=self.registry
        )
        self.generated_tokens = Counter("xformer_generated_tokens", "Generated tokens.", registry=self.registry)

    def text(self) -> bytes:
        """The page `/metrics`."""
        return generate_latest(self.registry)
