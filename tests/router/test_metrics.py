"""The text of `/metrics` is what the Prometheus library would write."""

import math

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from hpc_router.router.metrics import Metrics, gauges, text_of
from tests.router.support import replica, table_of


class Given(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self.families = families

    def collect(self) -> list[Metric]:
        return self.families


def of_the_library(families: list[Metric]) -> bytes:
    registry = CollectorRegistry()
    registry.register(Given(families))
    return generate_latest(registry)


def test_the_text_is_that_of_the_library() -> None:
    odd = GaugeMetricFamily("hpc_router_odd", 'a "text" with \\ and \n a line', labels=("a", "b"))
    values = (
        0,
        1,
        -1.5,
        999_999,
        999_999.875,
        1e6,
        -1e6,
        1234567.5,
        1.5e9,
        1e21,
        1e-9,
        math.inf,
        -math.inf,
        math.nan,
        0.1 + 0.2,
    )
    for number, value in enumerate(values):
        odd.add_metric((f'{number} "quoted" \\ \n é', ""), value)
    counted = Metrics()
    for number in range(3):
        counted.requests.add(f"expert {number}", "named", 200)
        counted.tokens.add_many(10**number * 7, "math", "usage")
        counted.first_byte.add(0.1 * number, "math", f"math-{number}.g1")
        counted.token_time.add(1e-4, "math")
    counted.retries_refused.add()
    table = table_of(replica("math-0.g1"), replica("law-0.g1", experts=("law", "tax"), ready=False))
    known = list(gauges(table, in_flight=3, max_in_flight=9, registry_age_s=0.25, workers=2))
    families = [odd, *known, *(f for each in counted._counted.values() for f in each.collect())]
    assert text_of(families) == of_the_library(families)


def test_what_is_measured_for_the_statistics_only_is_not_exposed() -> None:
    counted = Metrics()
    counted.before_attempt.add(0.1, "math", "math-0.g1")
    assert b"before_attempt" not in counted.exposition(())
