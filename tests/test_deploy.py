"""What deploy/ says agrees with the server: metrics in the dashboard, paths of probes, flags, times to leave."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import yaml

from scripted import ScriptedEngine, say, scripted_app
from trimtab.cli import build_parser
from trimtab.server.engine.engine import EngineStats
from trimtab.server.engine.request import Steering
from trimtab.server.metrics import Metrics
from trimtab.server.visit import Visit

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"


def read(path: str) -> Any:
    return list(yaml.safe_load_all((DEPLOY / path).read_text()))


def started_with(*arguments: str) -> argparse.Namespace:
    """What the image's entry point makes of these arguments after it."""
    (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    program, *flags = json.loads(entry)
    assert program == "trimtab"
    return build_parser().parse_args([*flags, *arguments])


def test_every_metric_of_the_dashboard_is_served_and_every_panel_has_its_own_place() -> None:
    metrics = Metrics("m")
    metrics.watch(Steering()).end("stop")
    metrics.count(Visit("r", "GET", "/"))
    told = metrics.render(EngineStats(0, 0, 0, 1, True, 0.0)).decode()
    dashboard = json.loads((DEPLOY / "grafana/dashboards/trimtab.json").read_text())
    asked = set(re.findall(r"trimtab:\w+", json.dumps(dashboard)))
    assert len(asked) > 10
    assert asked - set(re.findall(r"^(trimtab:\w+)", told, re.MULTILINE)) == set()
    shares = [
        t["expr"] for p in dashboard["panels"] for t in p.get("targets", ()) if "steering_steps_total" in t["expr"]
    ]
    assert len(shares) == 2
    assert all(share.count("sum by (correction, mode)") == 2 for share in shares), "each mode has steps of its own"
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in dashboard["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken))
    (sources,) = read("grafana/provisioning/datasources/prometheus.yml")
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"] if panel["type"] != "row"} == {
        source["uid"] for source in sources["datasources"]
    }


def test_the_image_has_the_compiler_without_which_triton_launches_nothing() -> None:
    stage = (ROOT / "Dockerfile").read_text().rpartition("FROM ")[2]
    (installed,) = re.findall(r"apt-get install .*--no-install-recommends (.*?) &&", stage)
    assert {"gcc", "libc6-dev"} <= set(installed.split())


def test_the_image_asks_itself_on_its_own_port_and_gives_a_model_time_to_load() -> None:
    text = (ROOT / "Dockerfile").read_text()
    (seconds,), (port,) = (re.findall(found, text) for found in (r"--start-period=(\d+)s", r"'127\.0\.0\.1', (\d+)"))
    assert int(seconds) >= 600
    assert int(port) == started_with().port


def test_compose_starts_the_server_as_the_image_allows() -> None:
    (compose,) = read("compose.yaml")
    server = compose["services"]["trimtab"]
    command = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in server["command"]]
    args = started_with(*command)
    assert args.model == "demo"
    assert args.drain_timeout < int(server["stop_grace_period"].removesuffix("s"))
    assert (server["read_only"], server["cap_drop"]) == (True, ["ALL"])
    conditions = [service.get("depends_on", []) for service in compose["services"].values()]
    assert all(isinstance(names, list) for names in conditions), "nothing waits until another one is healthy"
    (scraped,) = read("prometheus/prometheus.yml")
    assert scraped["scrape_configs"][0]["static_configs"] == [{"targets": ["trimtab:8000"]}]
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert source in compose["volumes"] or source.startswith("${") or (DEPLOY / source).exists()


def test_kubernetes_probes_what_the_server_answers_and_waits_until_it_has_left() -> None:
    deployment, service, budget = read("kubernetes/trimtab.yaml")
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    args = started_with(*container["args"])
    (pause,) = re.findall(r"sleep\((\d+)\)", container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert int(pause) + args.drain_timeout < pod["spec"]["terminationGracePeriodSeconds"]
    cache = 2 * 30 * 3 * 64 * 4 * args.max_num_seqs * args.max_model_len  # the demo's, in float32
    assert container["resources"]["limits"] == {"memory": "4Gi"}
    assert cache + 2 * 2**30 < 4 * 2**30
    assert container["envFrom"] == [{"secretRef": {"name": "trimtab-keys"}}], "no key, no pod: never open by mistake"
    paths = {getattr(route, "path", "") for route in scripted_app(ScriptedEngine(say("hi"))).routes}
    probed = {kind: container[kind]["httpGet"]["path"] for kind in container if kind.endswith("Probe")}
    assert len(probed) == 3
    assert set(probed.values()) <= paths
    assert probed["readinessProbe"] != probed["livenessProbe"]  # a server that drains is not dead
    labels = pod["metadata"]["labels"]
    assert service["spec"]["selector"] == budget["spec"]["selector"]["matchLabels"] == labels
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert 0 < budget["spec"]["minAvailable"] < deployment["spec"]["replicas"]
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
