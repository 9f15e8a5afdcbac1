"""A real Prometheus scrapes a real server under load; every query of every dashboard and alert must find data."""

import concurrent.futures
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import yaml

from pifa_vllm.served import free_port

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1200),  # the first test waits for the server
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="needs Prometheus (Debian's package prometheus)"
    ),
]

DEPLOY = Path(__file__).parents[2] / "deploy"
START_SECONDS = 900
# More than the floor of the alert on errors, 30 in five minutes.
REQUESTS = 48


@contextlib.contextmanager
def running(command, log, **environment):
    process = subprocess.Popen(
        command, stdout=log.open("w"), stderr=subprocess.STDOUT, env={**os.environ, **environment}
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(url, process, log):
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.25)


@pytest.fixture(scope="module")
def address(server):
    """Host and port of the server."""
    return server.url.removeprefix("http://")


@pytest.fixture(scope="module")
def prometheus(address, tmp_path_factory):
    """The address of a Prometheus with the committed configuration, but for the target and the intervals."""
    root = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [address]
    (root / "prometheus.yml").write_text(yaml.safe_dump(config))
    own, log = f"127.0.0.1:{free_port()}", root / "prometheus.log"
    command = ["prometheus", f"--config.file={root / 'prometheus.yml'}", f"--web.listen-address={own}"]
    with running([*command, f"--storage.tsdb.path={root / 'data'}"], log) as process:
        wait_for(f"http://{own}/-/ready", process, log)
        deadline = time.monotonic() + START_SECONDS
        while query(f"http://{own}", "up") != [1.0]:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        load(address)
        yield f"http://{own}"


def load(address):
    """Some seconds of requests from the OpenAI client, good ones and one that is not."""
    client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)

    def chat(number):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": f"Hello {number}"}], max_tokens=16
        )
        time.sleep(1)  # over several scrapes

    # A rate needs a scrape before, too, that knows the series.
    chat(0)
    time.sleep(3)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(chat, range(REQUESTS)))
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="unknown", messages=[{"role": "user", "content": "?"}])


def dashboard_queries():
    for path in sorted((DEPLOY / "grafana/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
                yield pytest.param(expression, id=f"{path.stem}: {panel['title']} {target['refId']}")


def rule_queries():
    for group in yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"]:
        for rule in group["rules"]:
            if "record" in rule:
                yield pytest.param(rule["expr"], id=rule["record"])
                yield pytest.param(rule["record"], id=f"{rule['record']} as recorded")
                continue
            if "absent(" in rule["expr"]:
                continue  # it has data where the others have none
            # An alert that does not fire returns nothing; its comparison as a number does.
            expression, changed = re.subn(r" (==|>|<) ([\d.]+)$", r" \1 bool \2", rule["expr"])
            assert changed == 1, f"{rule['alert']}: no comparison at the end of {rule['expr']}"
            yield pytest.param(expression, id=rule["alert"])


def query(prometheus, expression):
    """The values that Prometheus has for it by now, waiting for the next scrapes if there are none."""
    deadline = time.monotonic() + 20
    while True:
        answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression}, timeout=30).json()
        assert answer["status"] == "success", answer
        values = [float(sample["value"][1]) for sample in answer["data"]["result"]]
        if any(map(math.isfinite, values)) or time.monotonic() > deadline:
            return values
        time.sleep(0.5)


@pytest.mark.parametrize("expression", [*dashboard_queries(), *rule_queries()])
def test_a_query_finds_data(prometheus, expression):
    values = query(prometheus, expression)
    assert values, f"no data for {expression}"
    assert any(map(math.isfinite, values)), f"{values} for {expression}"


def test_what_is_recorded_is_what_happened(prometheus):
    increase = "sum(increase(pifa_responses_total{status='%s'}[5m]))"
    # Prometheus extrapolates increases, and does not see what came before its first scrape.
    assert query(prometheus, increase % "200")[0] == pytest.approx(REQUESTS, rel=0.5)
    assert query(prometheus, "pifa_ready") == [1.0]
    assert query(prometheus, "pifa:request_errors:ratio_rate5m") == [0.0]
    compressed, dense = (
        query(prometheus, f'pifa_weight_bytes{{form="{form}"}}')[0] for form in ("compressed", "dense")
    )
    assert 0 < compressed < dense


def test_no_alert_fires_and_grafanas_list_of_servers_is_not_empty(prometheus, address):
    alerts = httpx.get(f"{prometheus}/api/v1/alerts", timeout=30).json()["data"]["alerts"]
    assert [alert["labels"]["alertname"] for alert in alerts] == []
    labels = httpx.get(
        f"{prometheus}/api/v1/label/instance/values", params={"match[]": "pifa_ready"}, timeout=30
    )
    assert labels.json()["data"] == [address]
