"""The compose files follow the specification, and name files, targets and ports that exist."""

import re
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"


def read(name):
    return yaml.safe_load((DEPLOY / name).read_text())


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml", "compose.tls.yaml"])
def test_the_specification_is_followed(name):
    compose_spec = pytest.importorskip("compose_spec")
    compose_spec.PyCompose((DEPLOY / name).read_text())


def test_what_is_mounted_exists():
    for name in ("compose.yaml", "compose.tls.yaml"):
        for service in read(name)["services"].values():
            for volume in service.get("volumes", []):
                source = volume.split(":")[0]
                if source.startswith("."):
                    assert (DEPLOY / source).exists(), source
                elif "$" not in source:
                    assert source in read("compose.yaml")["volumes"]


def test_the_services_know_each_others_addresses():
    services = read("compose.yaml")["services"]
    (target,) = read("prometheus/prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == services["proxy"]["environment"]["PROXY_SERVER"] == "server:8000"
    (source,) = read("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert services["prometheus"]["ports"] == ["127.0.0.1:9090:9090"]
    (provider,) = read("grafana/provisioning/dashboards/pifa.yaml")["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
    assert (DEPLOY / "grafana/dashboards/overview.json").is_file()


def test_the_server_is_reached_through_the_proxy_only():
    services = read("compose.yaml")["services"]
    proxy = services["proxy"]["environment"]
    assert "ports" not in services["server"]
    assert services["proxy"]["ports"] == [f"${{PIFA_ADDRESS:-127.0.0.1}}:8000:{proxy['PROXY_LISTEN']}"]
    assert proxy["PROXY_SERVER"] == "server:8000"
    # The server believes the proxy, which hides the metrics that need no key.
    server = services["server"]["environment"]
    assert server["FORWARDED_ALLOW_IPS"] == "*"
    assert server["PIFA_SERVER_PUBLIC_METRICS"] == "true"
    assert "metrics" in proxy["PROXY_HIDDEN"]
    assert server["VLLM_API_KEY"].startswith("${VLLM_API_KEY:?")
    # Every variable of the template has a value.
    template = (DEPLOY / "proxy/nginx.conf.template").read_text()
    assert set(re.findall(r"\$\{(PROXY_\w+)\}", template)) == {
        name for name in proxy if name.startswith("PROXY_")
    }


def test_no_service_is_privileged_unlimited_or_of_an_unknown_version():
    for name, service in read("compose.yaml")["services"].items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["mem_limit"]
        assert service["pids_limit"] < 10_000
        if name != "server":
            assert re.search(r":[\w.-]+@sha256:[0-9a-f]{64}\}$", service["image"]), service["image"]


def test_nobody_can_log_in_to_grafana():
    grafana = read("compose.yaml")["services"]["grafana"]["environment"]
    assert grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert grafana["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert grafana["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert not [name for name in grafana if "PASSWORD" in name]


def test_the_data_source_scrapes_as_often_as_it_says():
    interval = read("prometheus/prometheus.yml")["global"]["scrape_interval"]
    (source,) = read("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["jsonData"]["timeInterval"] == interval
