"""Prometheus: an HTTP endpoint in this process with the values of the last step, for a Prometheus server to scrape.

Needs the package prometheus-client. A key `rms/NAME` is the gauge `sharded_optim_rms{tensor="NAME"}`, a key `loss` is `sharded_optim_loss`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

from sharded_optim.trackers.destination import Destination, Run, Status, kind_of

__all__ = ["DESTINATION", "Prometheus"]

SKIPPED_STEPS = "skipped_steps"  # a key that `optimizer.metrics()` always has
PREFIX = "sharded_optim_"
# The label for the part of a key after its first `/`, by the part before it; other keys with a "/" have the label "name".
LABELS = {
    "rms": "tensor",
    "clip_factor": "tensor",
    "non_finite": "tensor",
    "lr": "group",
    "weight_decay": "group",
    "ms": "part",
    "heartbeat_age_seconds": "rank",
}


class Prometheus:
    """Serve `http://<host>:<port>/metrics` from a thread, until the run is finished.

    Args:
        run: the run to track.
        host: the address to listen on. The endpoint has no password and no TLS: 127.0.0.1 can be reached from this machine only,
            and "0.0.0.0" from every machine that can reach this one.
        port: the port to listen on; 0 chooses a free one.
        live: returns further values at each scrape, with keys as in `log`; it is called on another thread.

    Attributes:
        address: (host, port) of the endpoint.
    """

    def __init__(
        self, run: Run, *, host: str = "127.0.0.1", port: int = 9464, live: Callable[[], Mapping[str, float]] | None = None
    ) -> None:
        client: Any = import_module("prometheus_client")
        self._metric: Any = import_module("prometheus_client.core").Metric
        self._live = live
        self._records: dict[tuple[str, bool], Mapping[str, float]] = {}  # by (kind, whether it has the optimizer's metrics)
        self._step: int | None = run.resume_after
        # Not the client's global registry: metrics of the user's own code stay out, and two runs in a process do not collide.
        registry = client.CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = client.start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise OSError(f"cannot listen on host={host!r}, port={port} ({error}); give another port or host") from error
        self.address: tuple[str, int] = self._server.server_address[:2]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # A record replaces the previous one of its kind, so that a tensor that is no longer reported has no value. Records with the
        # optimizer's metrics are a kind of their own, which stays meanwhile: with metrics_every=10 nine of ten records have none. The dict
        # is replaced rather than changed, as another thread reads it; the newest record is last.
        kind = kind_of(values), SKIPPED_STEPS in values
        self._records = {key: record for key, record in self._records.items() if key != kind} | {kind: dict(values)}
        self._step = step

    def finish(self, status: Status) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def describe(self) -> list[Any]:
        """Return no gauges: the registry asks for them when this object is registered, and their names are known after the first step."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield the gauges. The registry calls this at each scrape."""
        records, step = self._records, self._step
        values = {} if step is None else {"step": float(step)}
        for record in [*records.values(), {} if self._live is None else self._live()]:
            values |= record
        gauges: dict[str, Any] = {}
        seen = set()
        for key, value in values.items():
            first, _, rest = key.partition("/")
            name = PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", first)
            if (name, rest) not in seen:  # a gauge may have each label once, and two keys may differ only where both become `_`
                seen.add((name, rest))
                gauge = gauges.setdefault(name, self._metric(name, f"Last value of {first}.", "gauge"))
                gauge.add_sample(name, {LABELS.get(first, "name"): rest} if rest else {}, value)
        yield from gauges.values()


DESTINATION = Destination(opens=Prometheus, client="prometheus_client", install="prometheus-client")
