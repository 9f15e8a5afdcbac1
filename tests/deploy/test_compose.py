"""The compose files follow the specification, and name files, targets and ports that exist."""

from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"


def read(name):
    return yaml.safe_load((DEPLOY / name).read_text())


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_the_specification_is_followed(name):
    compose_spec = pytest.importorskip("compose_spec")
    compose_spec.PyCompose((DEPLOY / name).read_text())


def test_what_is_mounted_exists():
    for service in read("compose.yaml")["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
            elif "$" not in source:
                assert source in read("compose.yaml")["volumes"]


def test_the_services_know_each_others_addresses():
    services = read("compose.yaml")["services"]
    (target,) = read("prometheus/prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    host, port = target.split(":")
    # Without an API key, only for this machine.
    assert services[host]["ports"] == [f"${{PIFA_ADDRESS:-127.0.0.1}}:{port}:{port}"]
    assert services[host]["environment"]["VLLM_API_KEY"] == "${VLLM_API_KEY:-}"
    (source,) = read("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert services["prometheus"]["ports"] == ["127.0.0.1:9090:9090"]
    (provider,) = read("grafana/provisioning/dashboards/pifa.yaml")["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
    assert (DEPLOY / "grafana/dashboards/overview.json").is_file()


def test_the_data_source_scrapes_as_often_as_it_says():
    interval = read("prometheus/prometheus.yml")["global"]["scrape_interval"]
    (source,) = read("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["jsonData"]["timeInterval"] == interval
