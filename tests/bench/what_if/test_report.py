"""Table, JSON and plot of predictions: every form says what it is."""

import io
import json
from xml.etree import ElementTree

from rich.console import Console

from hpc_router.bench.what_if.demand import UserDemand, spread_around
from hpc_router.bench.what_if.report import demand_text, duration_text, plot, table, to_json
from hpc_router.bench.what_if.service import service_of
from hpc_router.bench.what_if.simulation import Prediction, Simulation
from hpc_router.config.compose import load_deployment

DEMAND = UserDemand(
    users=((0, 5), (60, 20)), think_s=1.0, for_s=300, prompt_tokens=spread_around(50, 0.5),
    answer_tokens=spread_around(20, 0.5),
)  # fmt: skip


def predictions() -> dict[str, Prediction]:
    found = {}
    for name in ("experts.code.replicas=1", "experts.code.replicas=2"):
        overrides = ["topology=sim", "experts.code.resources.gpus=1", "cluster.gpus=8", name]
        found[name] = Simulation(service_of(load_deployment(overrides), {}), DEMAND).run()
    return found


def text_of(made: dict[str, Prediction]) -> str:
    output = io.StringIO()
    Console(file=output, width=240).print(table(made, DEMAND))
    return output.getvalue()


def test_every_form_says_that_it_is_a_prediction() -> None:
    made = predictions()
    text, value, drawn = text_of(made), to_json(made, DEMAND), plot(made, DEMAND)
    assert text.startswith("PREDICTION, not a measurement")
    assert json.loads(json.dumps(value))["prediction"] is True
    assert "PREDICTION, not a measurement" in drawn


def test_the_table_has_each_deployment_each_expert_and_the_assumptions() -> None:
    made = predictions()
    text = text_of(made)
    for name, found in made.items():
        assert name in text
        assert all(f"  {expert} " in text for expert in found.experts)
        assert all(line in text for line in found.service.assumptions)
    assert "users: 5, 20 from 1m on; for 5m" in text
    assert "each expert gets the same share" in text.lower()


def test_the_plot_has_a_line_for_each_deployment_that_stays_within_the_picture() -> None:
    made = predictions()
    root = ElementTree.fromstring(plot(made, DEMAND))
    tags = [element.tag.rpartition("}")[2] for element in root]
    assert tags.count("polyline") == 1 + 4 * len(made)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for line in (e for e in root if e.tag.endswith("polyline")):
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width
            assert 0 <= y <= height


def test_durations_have_the_largest_unit_that_fits() -> None:
    assert [duration_text(s) for s in (0.5, 59, 60, 5400, 28800, 86400)] == ["0.5s", "59s", "1m", "1.5h", "8h", "1d"]
    lengths = spread_around(8, 0)
    without = UserDemand(users=((0, 1),), think_s=0, for_s=60, prompt_tokens=lengths, answer_tokens=lengths)
    assert "no pauses" in demand_text(without)
