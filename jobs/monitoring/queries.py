"""PromQL over the metrics of a grstream system, and over those of Ray that it uses."""

from grstream.telemetry import Kind, Metric

# Ray's and Serve's own, as Ray 2.60 exports them; each is looked for in a running cluster by a test.
HTTP_REQUESTS = "ray_serve_num_http_requests_total"
HTTP_LATENCY_MS = "ray_serve_http_request_latency_ms"
DEPLOYMENT_STATUS = "ray_serve_deployment_status"
PROXY_STATUS = "ray_serve_proxy_status"
REPLICA_STARTS = "ray_serve_deployment_replica_starts_total"
REPLICA_QUERIES = "ray_serve_replica_processing_queries"
STORE_USED = "ray_object_store_used_memory"
STORE_FREE = "ray_object_store_available_memory"
OF_RAY = (
    *(HTTP_REQUESTS, HTTP_LATENCY_MS, DEPLOYMENT_STATUS, PROXY_STATUS, REPLICA_STARTS, REPLICA_QUERIES),
    *(STORE_USED, STORE_FREE),
)
HEALTHY, PROXY_HEALTHY = 6, 2  # of DEPLOYMENT_STATUS and PROXY_STATUS
SCORES = r'route=~"/v1/(batch/)?(rank|retrieve|recommend)"'


class Queries:
    """Expressions over the series that a matcher selects, '' for all, kept apart by the label `within`."""

    def __init__(self, matcher: str, window: str, within: str = "") -> None:
        self._matcher, self.window, self._within = matcher, window, within

    def of(self, metric: Metric | str, *matchers: str, suffix: str = "") -> str:
        """The series of a metric, with more matchers such as `slice="all"`."""
        name = metric if isinstance(metric, str) else metric.exported
        inside = ", ".join([*matchers, *([self._matcher] if self._matcher else [])])
        return f"{name}{suffix}" + (f"{{{inside}}}" if inside else "")

    def rate(self, metric: Metric | str, *matchers: str, by: str = "", suffix: str = "") -> str:
        """Of a counter a second, summed over processes."""
        assert isinstance(metric, str) or suffix or metric.kind is Kind.COUNTER, metric
        return f"sum{self._by(by)} (rate({self.of(metric, *matchers, suffix=suffix)}[{self.window}]))"

    def increase(self, metric: Metric | str, *matchers: str, by: str = "") -> str:
        return f"sum{self._by(by)} (increase({self.of(metric, *matchers)}[{self.window}]))"

    def largest(self, metric: Metric | str, *matchers: str, by: str = "") -> str:
        """Of a gauge, over processes."""
        return f"max{self._by(by)} ({self.of(metric, *matchers)})"

    def least(self, metric: Metric | str, *matchers: str, by: str = "") -> str:
        return f"min{self._by(by)} ({self.of(metric, *matchers)})"

    def total(self, metric: Metric | str, *matchers: str, by: str = "") -> str:
        return f"sum{self._by(by)} ({self.of(metric, *matchers)})"

    def quantile(self, q: float, metric: Metric | str, *matchers: str, by: str = "") -> str:
        """Of a histogram, over processes."""
        within = ", ".join(["le", *([by] if by else [])])
        return f"histogram_quantile({q:g}, {self.rate(metric, *matchers, by=within, suffix='_bucket')})"

    def _by(self, labels: str) -> str:
        every = ", ".join(label for label in (labels, self._within) if label)
        return f" by ({every})" if every else ""
