"""A real nginx with the configuration that compose.yaml mounts, before an application that tells what it gets."""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from pifa_vllm.served import free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
PROXY = DEPLOY / "proxy"
SECONDS = 1.0  # for what compose.yaml gives 30

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx (Debian's nginx-light)")


def defaults():
    """The variables that compose.yaml gives the proxy where the user gives none."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    given = compose["services"]["proxy"]["environment"]
    values = {name: re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", value) for name, value in given.items()}
    return {name: value for name, value in values.items() if name.startswith("PROXY_")}


def wait_for_port(port, process):
    for _ in range(300):
        assert process.poll() is None
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port}")


@contextlib.contextmanager
def running(command, port, **environment):
    process = subprocess.Popen(command, env={**os.environ, **environment})
    try:
        wait_for_port(port, process)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@contextlib.contextmanager
def nginx(root, upstream, tls_port=None, **changed):
    """Nginx with the committed configuration; yields its port."""
    port = free_port()
    values = {**defaults(), "PROXY_SERVER": f"127.0.0.1:{upstream}", "PROXY_LISTEN": f"127.0.0.1:{port}"}
    values |= {"PROXY_TIMEOUT": f"{SECONDS * 1000:.0f}ms", **changed}
    # As the image's start-up script does it.
    text = re.sub(
        r"\$\{(PROXY_\w+)\}", lambda found: values[found[1]], (PROXY / "nginx.conf.template").read_text()
    )
    (root / "nginx.conf").write_text(text)
    if tls_port:
        (root / "tls").mkdir()
        tls = (PROXY / "tls.conf").read_text().replace("8443", f"127.0.0.1:{tls_port}")
        (root / "tls/tls.conf").write_text(tls.replace("/etc/nginx/certificate", str(root)))
    # As root, nginx's workers would be those of a user who may not enter pytest's directories.
    command = ["nginx", "-e", "stderr", "-p", str(root), "-c", str(root / "nginx.conf")]
    command += ["-g", f"user {getpass.getuser()};"] if os.getuid() == 0 else []
    with running(command, port):
        yield port


@pytest.fixture(scope="module")
def upstream():
    """The port of the application."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "tests.deploy.upstream:app", f"--port={port}"]
    with running([*command, "--log-level=warning"], port, FORWARDED_ALLOW_IPS="*"):
        yield port


@pytest.fixture(scope="module")
def port(upstream, tmp_path_factory):
    """The proxy's port."""
    root = tmp_path_factory.mktemp("proxy")
    # What pytest makes is its user's only; nginx's workers are another's.
    for directory in (root, root.parent, root.parent.parent):
        directory.chmod(0o755)
    with nginx(root, upstream) as port:
        yield port


@pytest.fixture
def client(port):
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        yield client


def seen(upstream):
    """What the application has seen, asked without the proxy."""
    return httpx.get(f"http://127.0.0.1:{upstream}/seen", timeout=30).json()


def wait_until_left(upstream, path):
    deadline = time.monotonic() + 20
    while path not in seen(upstream)["left"]:
        assert time.monotonic() < deadline, f"{path} goes on"
        time.sleep(0.1)


def connect(port, data=b"", receive_buffer=None):
    """A connection on which something has been sent."""
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", port))
    connection.sendall(data)
    return connection


def rest(connection):
    """What comes until the connection is closed."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            received += piece
    return received


def post(path, *headers):
    lines = [f"POST {path} HTTP/1.1", "Host: x", *headers, "", ""]
    return "\r\n".join(lines).encode()


def is_refusal(response, status):
    """Whether it is nginx's own, in the shape of OpenAI's errors."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    return response.status_code == status == error["code"]


def test_a_request_passes(client):
    request = {"X-Request-Id": "abc", "Authorization": "Bearer key", "X-Forwarded-For": "192.0.2.1"}
    found = client.post("/v1/chat/completions", content=b"y" * 100_000, headers=request).json()
    assert found["body"] == 100_000
    assert found["headers"]["x-request-id"] == "abc"
    assert found["headers"]["authorization"] == "Bearer key"
    assert found["headers"]["host"] == client.base_url.netloc.decode()
    # The client's own word on its address does not count.
    assert found["headers"]["x-forwarded-for"] == found["client"] == "127.0.0.1"


def test_the_clients_address_is_what_it_is(port):
    transport = httpx.HTTPTransport(local_address="127.0.0.9")
    with httpx.Client(transport=transport) as client:
        assert client.get(f"http://127.0.0.1:{port}/v1/models").json()["client"] == "127.0.0.9"


def test_a_stream_passes_token_by_token(client):
    came = []
    with client.stream("POST", "/v1/tokens") as response:
        for piece in response.iter_raw():
            came.append((piece, time.monotonic()))
    assert [piece for piece, _ in came] == [b"data: %d\n\n" % number for number in range(5)]
    # They are sent 0.2 s apart.
    assert came[-1][1] - came[0][1] > 0.6


def test_slow_headers_are_cut_off(port):
    connection = connect(port, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n")
    started = time.monotonic()
    with contextlib.suppress(OSError):
        while time.monotonic() - started < 10:  # a piece now and then does not help
            connection.sendall(b"X-A: b\r\n")
            time.sleep(0.2)
    assert time.monotonic() - started < 3 * SECONDS


def test_a_slow_body_is_cut_off_and_does_not_reach_the_server(port, upstream):
    started = time.monotonic()
    rest(connect(port, post("/slow/body", "Content-Length: 1000") + b"x" * 10))
    assert SECONDS * 0.5 < time.monotonic() - started < 5 * SECONDS
    assert "/slow/body" not in seen(upstream)["seen"]


def test_endless_headers_are_refused(port):
    connection = connect(port, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n")
    with contextlib.suppress(OSError):
        for number in range(10_000):
            connection.sendall(b"X-%d: %s\r\n" % (number, b"y" * 1000))
    # On a closed connection that still has something to read, its end may be a reset instead of the answer.
    assert rest(connection)[:12] in (b"", b"HTTP/1.1 431")


@pytest.mark.parametrize("headers", [{"X-Large": "y" * 9000}, {f"X-{n}": "y" * 7000 for n in range(6)}])
def test_large_headers_are_refused(client, headers):
    assert is_refusal(client.get("/v1/models", headers=headers), 431)


def test_a_long_address_is_refused(client):
    assert is_refusal(client.get("/v1/models?" + "x" * 9000), 414)


def test_what_is_no_http_is_refused(port):
    answer = rest(connect(port, b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: y\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"code": 400' in answer


def test_a_body_of_just_under_the_limit_passes(client):
    assert client.post("/v1/completions", content=b"y" * (4 << 20)).json()["body"] == 4 << 20


@pytest.mark.parametrize("chunked", [False, True])
def test_a_larger_body_is_refused_and_does_not_reach_the_server(client, upstream, chunked):
    path = f"/large/{chunked}"
    body = b"y" * ((4 << 20) + 1)
    response = client.post(path, content=iter([body]) if chunked else body)
    assert is_refusal(response, 413)
    assert "4m" in response.json()["error"]["message"]
    assert path not in seen(upstream)["seen"]


def test_an_endless_body_is_refused(port, upstream):
    connection = connect(port, post("/endless/body", "Transfer-Encoding: chunked"))
    with contextlib.suppress(OSError):
        for _ in range(1000):
            connection.sendall(b"10000\r\n" + b"y" * 65536 + b"\r\n")
    assert rest(connection)[:12] in (b"", b"HTTP/1.1 413")
    assert "/endless/body" not in seen(upstream)["seen"]


def test_a_client_that_does_not_read_is_cut_off(port, upstream):
    connection = connect(port, post("/unread/flood", "Content-Length: 0"), receive_buffer=4096)
    wait_until_left(upstream, "/unread/flood")
    connection.close()


@pytest.mark.parametrize("path", ["/leaves/flood", "/leaves/never"])
def test_the_server_sees_that_a_client_leaves(port, upstream, path):
    connection = connect(port, post(path, "Content-Length: 0"))
    time.sleep(0.5)
    connection.close()
    wait_until_left(upstream, path)


def test_slow_clients_do_not_keep_others_waiting(port, client):
    half = [b"GET /v1/models HTTP/1.1\r\nHost: x\r\n", post("/slow/many", "Content-Length: 1000") + b"x"]
    slow = [connect(port, half[number % 2]) for number in range(200)]
    started = time.monotonic()
    assert client.get("/v1/models").status_code == 200
    assert time.monotonic() - started < 2
    for connection in slow:
        connection.close()


@pytest.mark.parametrize("method", ["GET", "OPTIONS", "POST"])
def test_what_is_not_for_the_outside_is_hidden(port, upstream, method):
    before = seen(upstream)["seen"]
    for path in ("/metrics", "/metrics/", "//metrics", "/%6detrics", "/a/../metrics?b", "/dashboard"):
        answer = rest(
            connect(port, f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        )
        assert answer.startswith(b"HTTP/1.1 404"), path
        assert b'"code": 404' in answer, path
    assert seen(upstream)["seen"] == [*before, "/seen"]


def test_only_those_paths_are_hidden(client):
    assert client.get("/v1/metrics").status_code == 200
    assert is_refusal(client.get("/.refused"), 404)


def test_a_client_has_so_many_connections_and_no_more(upstream, port, tmp_path):
    with nginx(tmp_path, upstream, PROXY_CONNECTIONS="3") as own:
        held = [connect(own, post("/held/never", "Content-Length: 0")) for _ in range(3)]
        time.sleep(0.5)
        assert is_refusal(httpx.get(f"http://127.0.0.1:{own}/v1/models"), 429)
        elsewhere = httpx.HTTPTransport(local_address="127.0.0.9")
        with httpx.Client(transport=elsewhere) as other:
            assert other.get(f"http://127.0.0.1:{own}/v1/models").status_code == 200
        for connection in held:
            connection.close()


def test_a_server_that_is_not_there_or_does_not_answer(upstream, port, tmp_path):
    with nginx(tmp_path, free_port()) as own:
        assert is_refusal(httpx.get(f"http://127.0.0.1:{own}/v1/models"), 502)
    with nginx(tmp_path, upstream, PROXY_READ_TIMEOUT="1s") as own:
        assert is_refusal(httpx.get(f"http://127.0.0.1:{own}/late/never", timeout=30), 504)
    wait_until_left(upstream, "/late/never")


def test_tls(upstream, port, tmp_path):
    certificate = [*("-keyout", str(tmp_path / "tls.key"), "-out", str(tmp_path / "tls.crt")), "-nodes"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += [*certificate, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    tls_port = free_port()
    with nginx(tmp_path, upstream, tls_port):
        trusted = ssl.create_default_context(cafile=tmp_path / "tls.crt")
        found = httpx.get(f"https://localhost:{tls_port}/v1/models", verify=trusted, trust_env=False).json()
        assert found["headers"]["x-forwarded-proto"] == "https"
