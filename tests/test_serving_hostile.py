"""Requests that mean harm, and servers that are killed: nothing crashes or hangs, and every refusal is a status of 4xx."""

import json
import os
import random
import signal
import socket
import string
import subprocess
import sys
import time

import httpx
import pytest
import schemathesis
from engines import generate_alone, make_engine
from hypothesis import HealthCheck, Phase, given, settings
from test_serving import GREEDY, PROMPT, serving

from trl_personal.serving.gate import Limits
from trl_personal.serving.keys import KeyFile, add_key
from trl_personal.serving.server import create_app


pytestmark = pytest.mark.slow

SMALL = Limits(max_body_bytes=20_000, max_tokens=40, default_tokens=8, max_seconds=20)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The address of a server, its engine, and the key of one who may ask for `user 1` only."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    secret = add_key(path, "app", ["user 1"])
    root = add_key(path, "root", None, is_admin=True)
    engine = make_engine()
    with serving(engine, KeyFile(path), SMALL) as address:
        yield address, engine, secret, root


def is_well(address, secret):
    """Whether the server still answers, and rightly."""
    expected = generate_alone(make_engine(), PROMPT, "user 1", 12)
    body = {"prompt": PROMPT, "user": "user 1", **GREEDY}
    answer = httpx.post(
        f"{address}/v1/completions", json=body, headers={"Authorization": f"Bearer {secret}"}, timeout=20
    )
    return answer.json()["choices"][0]["text"] == expected


ROUTES = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/users/join",
    "/v1/users/update",
    "/v1/users/remove",
    "/v1/users/export",
]


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("route", ROUTES)
def test_what_the_openapi_schema_allows_and_what_it_does_not(hostile, route, mode):
    """50 requests that schemathesis makes of the schema, right or wrong ones; 600 in all."""
    address, _, secret, root = hostile
    headers = {"Authorization": f"Bearer {root if '/users/' in route else secret}"}
    schema = schemathesis.openapi.from_dict(create_app(make_engine()).openapi())
    statuses = []

    @settings(
        max_examples=50,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(schema[route]["POST"].as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def ask(case):
        response = case.call(base_url=address, headers=headers, timeout=25)
        statuses.append(response.status_code)
        assert response.status_code < 500 or response.status_code == 501, response.text

    ask()
    assert len(statuses) >= 50
    assert mode == "positive" or max(statuses) < 500
    assert is_well(address, secret)


def random_json(rng, depth=0):
    kinds = [
        lambda: rng.choice([None, True, False]),
        lambda: rng.choice([0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400]),
        lambda: rng.choice([0.0, -0.5, 1e308, 1e-320, float("nan"), float("inf")]),
        lambda: "".join(rng.choices(string.printable + "é\u202e\ud800\x00日", k=rng.randint(0, 40))),
        lambda: rng.choice(["user 1", "user 2", "../../etc/passwd", "{{ 7*7 }}", "<bos>", "' OR 1=1 --"]),
    ]
    if depth < 4:
        kinds += [
            lambda: [random_json(rng, depth + 1) for _ in range(rng.randint(0, 4))],
            lambda: {rng.choice(FIELDS): random_json(rng, depth + 1) for _ in range(rng.randint(0, 4))},
        ]
    return rng.choice(kinds)()


FIELDS = [
    "prompt", "messages", "user", "users", "user_strength", "user_profile", "max_tokens", "temperature", "top_p", "n", "stop",
    "seed", "stream", "stream_options", "model", "role", "content", "pairs", "user_ids", "chosen", "rejected", "user_id", "x",
]  # fmt: skip


def random_request(rng):
    """Method, path, headers and body; one of twelve is right, about a third begin as a right request."""
    if rng.random() < 1 / 12:
        right = {"prompt": PROMPT, "max_tokens": 2, "user": rng.choice(["user 1", "user 2"])}
        return "POST", ROUTES[0], {"Content-Type": "application/json"}, json.dumps(right).encode()
    right = (
        {"prompt": PROMPT, "max_tokens": 2}
        if rng.random() < 0.5
        else {"messages": [{"role": "user", "content": PROMPT}]}
    )
    body = right if rng.random() < 0.35 else {}
    for _ in range(rng.choice([0, 0, 1, 2, 3, 4])):
        body[rng.choice(FIELDS)] = random_json(rng)
    raw = json.dumps(body).encode("utf-8", "surrogatepass")
    kind = rng.random()
    if kind < 0.1:
        raw = raw[: rng.randint(0, len(raw))]
    elif kind < 0.2:
        raw = bytes(rng.choices(range(256), k=rng.randint(0, 300)))
    elif kind < 0.25:
        raw = b"[" * rng.choice([10, 1000, 9000])
    elif kind < 0.28:
        raw = b'{"prompt": "' + b"a" * rng.choice([100, 30_000]) + b'"}'
    elif kind < 0.31:
        raw = b'{"seed": ' + b"9" * 9000 + b"}"
    headers = {
        "Content-Type": rng.choice(
            ["application/json"] * 6 + ["text/plain", "multipart/form-data", "a/b; charset=\x7f"]
        )
    }
    if rng.random() < 0.2:
        headers[rng.choice(["X-Request-Id", "Host", "Accept", "Content-Encoding", "Cookie"])] = "".join(
            rng.choices(string.ascii_letters + " ;,=()", k=rng.randint(0, 200))
        ).strip()
    return (
        rng.choice(["POST"] * 8 + ["GET", "PUT", "DELETE"]),
        rng.choice([*ROUTES[:2] * 4, *ROUTES, "/", "/v1/%00"]),
        headers,
        raw,
    )


def test_1000_random_requests(hostile):
    """A seeded fuzz: statuses of 2xx and 4xx alone (501 from the routes of administrators, as this engine has none)."""
    address, _, secret, root = hostile
    rng, statuses = random.Random(0), []
    with httpx.Client(base_url=address, timeout=25) as client:
        for _ in range(1000):
            method, path, headers, raw = random_request(rng)
            key = rng.choice([secret] * 6 + [root, "wrong", "tp_app_", ""])
            headers["Authorization"] = f"Bearer {key}".strip()
            try:
                response = client.request(method, path, headers=headers, content=raw)
            except (httpx.ReadError, httpx.WriteError):  # what is no HTTP is told so, and the rest of it is not read
                assert "\x7f" in headers["Content-Type"]
                continue
            statuses.append(response.status_code)
            assert response.status_code < 500 or response.status_code == 501, (response.status_code, path, raw[:300])
            if response.status_code == 200 and "user 2" in json.dumps(raw.decode("utf-8", "replace")):
                body = json.loads(raw)
                assert key == root or (body.get("user") != "user 2" and "user 2" not in (body.get("users") or {}))
    assert {400, 401, 403} <= set(statuses)
    assert statuses.count(200) > 20
    assert is_well(address, secret)


def test_100_broken_connections(hostile):
    """Bytes that are no HTTP, requests that stop in the middle, headers without end."""
    address, engine, secret, _ = hostile
    host, port = address.removeprefix("http://").split(":")
    rng, kept = random.Random(1), []
    for number in range(100):
        connection = socket.create_connection((host, int(port)), timeout=5)
        content = [
            bytes(rng.choices(range(256), k=200)),
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 100_000,
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{",
        ][number % 7]
        try:
            connection.sendall(content)
        except OSError:
            pass
        kept.append(connection)
    assert is_well(address, secret)
    for connection in kept:
        connection.close()
    assert is_well(address, secret)


@pytest.fixture
def command(tmp_path):
    """A saved model, and how to serve it as a process."""
    engine = make_engine()
    engine.model.save_pretrained(tmp_path / "out")
    engine._tokenizer.save_pretrained(tmp_path / "out")
    add_key(tmp_path / "keys.json", "unused", [])
    secret = add_key(tmp_path / "keys.json", "app", None, is_admin=True)

    def start():
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        arguments = ["serve", str(tmp_path / "out"), "--port", str(port), "--keys", str(tmp_path / "keys.json")]
        process = subprocess.Popen(
            [sys.executable, "-m", "trl_personal.cli", *arguments], stderr=subprocess.PIPE, text=True, env=os.environ
        )
        address = f"http://127.0.0.1:{port}"
        for _ in range(1200):
            try:
                httpx.get(f"{address}/health", timeout=1)
                break
            except httpx.HTTPError:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.1)
        return process, address

    return start, secret


def test_a_killed_server_starts_again_and_a_stopped_one_finishes(command):
    start, secret = command
    headers = {"Authorization": f"Bearer {secret}"}
    process, address = start()
    try:
        assert is_well(address, secret)
        removed = httpx.post(f"{address}/v1/users/remove", json={"user_ids": ["user 9"]}, headers=headers, timeout=30)
        assert removed.json()["num_users"] == 15
        process.kill()
        process.wait(10)
        process, address = start()
        assert is_well(address, secret)
        with httpx.stream(
            "POST",
            f"{address}/v1/completions",
            json={"prompt": PROMPT, "user": "user 1", "temperature": 0, "max_tokens": 50, "stream": True},
            headers=headers,
            timeout=30,
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert list(lines)[-2] == "data: [DONE]"
        process.wait(20)
        log = process.stderr.read()
        assert "POST /v1/completions 200" in log
        assert "user 1" not in log
        assert PROMPT not in log
    finally:
        process.kill()
