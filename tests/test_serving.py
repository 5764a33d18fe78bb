"""The server: OpenAI's own client talks to it, keys and limits hold, and nothing about people is in its log."""

import asyncio
import json
import logging
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import uvicorn
from engines import generate_alone, make_engine, make_tasks

from trl_personal import AutoPersonalizedModelForCausalLM
from trl_personal.cli import main
from trl_personal.engine.loading import load_engine
from trl_personal.models.folder_users import load_known_users, write_known_users
from trl_personal.serving.gate import Limits
from trl_personal.serving.interface import EngineError, Piece, RequestError
from trl_personal.serving.keys import KeyFile, add_key, read_keys
from trl_personal.serving.run import check_address, open_socket
from trl_personal.serving.server import create_app


PROMPT = "please write a story"
GREEDY = {"temperature": 0, "max_tokens": 12}


@contextmanager
def serving(engine, keys=None, limits=None):
    """The address of a server in a thread."""
    with open_socket("127.0.0.1", 0, keys) as listener:
        config = uvicorn.Config(create_app(engine, keys, limits), log_config=None, access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    secrets = {
        "app": add_key(path, "app", ["user 1", "user 2"]),
        "all": add_key(path, "all", None),
        "root": add_key(path, "root", None, is_admin=True),
    }
    return KeyFile(path), secrets


@pytest.fixture(scope="module")
def server(keys):
    engine = make_engine()
    reference = make_engine()
    with serving(engine, keys[0]) as address:
        yield address, reference, keys[1]


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key=server[2]["all"], max_retries=0)


def post(server, body, key="all", route="/v1/completions", **headers):
    headers = {"Authorization": f"Bearer {server[2].get(key, key)}"} | headers
    return httpx.post(server[0] + route, json=body, headers=headers, timeout=30)


def test_openais_client_gets_the_answer_of_generate(server, client):
    expected = generate_alone(server[1], PROMPT, "user 1", 12)
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": PROMPT}], user="user 1", **GREEDY
    )
    text = client.completions.create(model="tiny", prompt=PROMPT, user="user 1", **GREEDY)
    assert chat.choices[0].message.content == text.choices[0].text == expected
    assert chat.choices[0].message.role == "assistant"
    assert chat.usage.prompt_tokens == 5
    assert chat.usage.total_tokens == 5 + chat.usage.completion_tokens
    assert chat.answered_for == "user"
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_openais_client_reads_a_stream(server, client):
    expected = generate_alone(server[1], PROMPT, "user 2", 12)
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
            user="user 2",
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage.prompt_tokens == 5
    assert chunks[0].answered_for == "user"
    pieces = client.completions.create(model="tiny", prompt=PROMPT, user="user 2", stream=True, **GREEDY)
    assert "".join(piece.choices[0].text for piece in pieces) == expected


def test_several_answers_to_several_prompts(server, client):
    """Answer `i * n + j` is the `j`-th to prompt `i`; with a seed each of them comes again, alone or not."""
    options = {"model": "tiny", "user": "user 1", "max_tokens": 6, "temperature": 1.5, "seed": 5}
    found = client.completions.create(prompt=[PROMPT, "the story"], n=2, **options)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in found.choices]
    assert texts[0] != texts[1]
    again = client.completions.create(prompt="the story", **options | {"seed": 6})
    assert again.choices[0].text == texts[3]
    streamed = [""] * 4
    for piece in client.completions.create(prompt=[PROMPT, "the story"], n=2, stream=True, **options):
        streamed[piece.choices[0].index] += piece.choices[0].text
    assert streamed == texts


def test_token_ids_are_a_prompt_too(server, client):
    expected = generate_alone(server[1], PROMPT, "user 1", 12)
    ids = server[1].encode(PROMPT)
    for prompt in (ids, [ids]):
        assert (
            client.completions.create(model="tiny", prompt=prompt, user="user 1", **GREEDY).choices[0].text == expected
        )


def test_stop_texts_end_an_answer(server, client):
    whole = generate_alone(server[1], PROMPT, "user 5", 12)
    stop = whole.split()[2]
    found = client.completions.create(model="tiny", prompt=PROMPT, user="user 5", stop=[stop, "never"], **GREEDY)
    assert found.choices[0].text == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("asked", "user", "strength", "said"),
    [
        ({}, None, 1, "generic"),
        ({"user": "nobody"}, None, 1, "unknown"),
        ({"user": "user 3"}, "user 3", 1, "user"),
        ({"user": "user 3", "user_strength": 0.5}, "user 3", 0.5, "user"),
        ({"users": {"user 3": 0.7, "user 4": 0.3}}, {"user 3": 0.7, "user 4": 0.3}, 1, "blend"),
        ({"users": {"nobody": 0.7}}, None, 1, "unknown"),
    ],
)
def test_the_response_says_whose_soft_prompt_was_used(server, asked, user, strength, said):
    expected = generate_alone(server[1], PROMPT, None, 12, user_ids=[user], user_strength=[strength])
    found = post(server, {"prompt": PROMPT, **asked, **GREEDY})
    assert found.headers["x-answered-for"] == found.json()["answered_for"] == said
    assert found.json()["choices"][0]["text"] == expected
    streamed = post(server, {"prompt": PROMPT, **asked, **GREEDY, "stream": True})
    assert streamed.headers["x-answered-for"] == said
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == expected
    assert streamed.text.endswith("data: [DONE]\n\n")


def test_64_requests_at_once_streamed_and_not(server):
    """Half of them as a stream, over 64 connections."""
    tasks = make_tasks()
    expected = [generate_alone(server[1], *task) for task in tasks]

    def ask(number):
        prompt, user, num_tokens = tasks[number]
        body = {"prompt": prompt, "user": user, "temperature": 0, "max_tokens": num_tokens, "stream": number % 2 == 0}
        answer = post(server, body)
        if number % 2:
            return answer.json()["choices"][0]["text"]
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        return "".join(event["choices"][0]["text"] for event in events)

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(ask, range(64))) == expected


# --- Keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "body", "status"),
    [
        ("app", {"user": "user 1"}, 200),
        ("app", {}, 200),
        ("app", {"user": "user 3"}, 403),
        ("app", {"user": "nobody"}, 403),
        ("app", {"users": {"user 1": 0.5, "user 3": 0.5}}, 403),
        ("app", {"user": "user 3", "stream": True}, 403),
        ("all", {"user": "user 3"}, 200),
        ("wrong", {"user": "user 1"}, 401),
        ("tp_app_", {}, 401),
        ("tp_app_wrong", {}, 401),
    ],
)
def test_a_key_speaks_for_its_users(server, key, body, status):
    answer = post(server, {"prompt": PROMPT, "max_tokens": 1, **body}, key)
    assert answer.status_code == status
    if status != 200:
        error = answer.json()["error"]
        assert error["type"] == ("permission_error" if status == 403 else "authentication_error")
        assert "user 3" not in answer.text


def test_users_are_changed_by_administrators_alone(server):
    body = {"user_ids": ["user 1"]}
    for route in ("join", "update", "remove", "export"):
        sent = {"pairs": [{"user_id": "eve", "chosen": "yes", "rejected": "no"}]} if route == "update" else body
        assert post(server, sent, "all", f"/v1/users/{route}").status_code == 403
        assert post(server, sent, "root", f"/v1/users/{route}").status_code == 501  # this engine has no administrator
    assert post(server, {"pairs": []}, "root", "/v1/users/join").status_code == 400


def test_routes_without_a_key(server):
    assert httpx.get(f"{server[0]}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server[0]}/metrics").status_code == 401
    assert httpx.get(f"{server[0]}/v1/models").status_code == 401


def test_keys_come_and_go_while_the_server_runs(tmp_path):
    path = tmp_path / "keys.json"
    first = add_key(path, "first", ["ann"])
    keys = KeyFile(path)
    second = add_key(path, "second", None, is_admin=True)
    assert keys.find(second).is_admin
    assert not keys.find(first).may_speak_for("bo")
    entries = json.loads(path.read_text())
    path.write_text(json.dumps({"keys": entries["keys"][1:]}))
    assert keys.find(first) is None
    assert keys.find(second) is not None
    path.write_text("{")  # while somebody edits it
    assert keys.find(second) is not None
    path.write_text(json.dumps(entries))
    assert keys.find(first) is not None
    assert path.stat().st_mode & 0o77 == 0
    assert first not in path.read_text()
    assert first.rpartition("_")[2] not in path.read_text()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        '{"keys": [{"name": "a"}]}',
        '{"keys": [{"name": "a", "salt": "zz", "digest": "00"}]}',
        '{"keys": [{"name": "a", "salt": "00", "digest": "00"}]}',
        '{"keys": [{"name": "a", "salt": "00", "digest": "00", "users": "ann"}]}',
        '{"keys": [1]}',
    ],
)
def test_a_file_that_holds_no_keys_is_refused(tmp_path, content):
    (tmp_path / "keys.json").write_text(content)
    with pytest.raises(ValueError, match=r"keys\.json"):
        read_keys(tmp_path / "keys.json")


def test_the_command_makes_a_key_and_shows_it_once(tmp_path, capsys):
    path = tmp_path / "keys.json"
    assert main(["key", str(path), "--name", "app", "--users", "ann", "bo"]) == 0
    key = KeyFile(path).find(capsys.readouterr().out.strip())
    assert (key.name, key.users, key.is_admin) == ("app", ["ann", "bo"], False)
    assert main(["key", str(path), "--name", "app", "--all_users"]) == 1
    assert "has a key 'app' already" in capsys.readouterr().err
    assert main(["key", str(path), "--name", "a_b", "--all_users"]) == 1


def test_without_keys_only_this_machine_is_answered():
    with pytest.raises(ValueError, match="listens on 127.0.0.1 only, not on 0.0.0.0"):
        check_address("0.0.0.0", None)
    with serving(make_engine()) as address:
        body = {"prompt": PROMPT, "max_tokens": 1, "user": "user 1"}
        assert httpx.post(f"{address}/v1/completions", json=body).status_code == 200
        rebound = httpx.post(f"{address}/v1/completions", json=body, headers={"Host": "evil.example"})
        assert rebound.status_code == 403
        assert httpx.post(f"{address}/v1/users/remove", json={"user_ids": ["user 1"]}).status_code == 403


# --- Limits, errors, clients that go ----------------------------------------------------------------------------------


class SlowEngine:
    """Writes a word each time that it is let."""

    name, max_tokens, has_chat_template, has_profiles, admin = "slow", 50, False, False, None
    is_alive, num_users, vocab_size = True, 0, 100

    def __init__(self, fails=None, pause=0.0, num_words=1):
        self.fails, self.pause, self.num_words = fails, pause, num_words
        self.let, self.open = asyncio.Event(), 0

    def knows(self, user_id):
        return False

    def encode(self, prompt, user_profile=None):
        return [1] * len(prompt.split())

    def gauges(self):
        return {"running": self.open}

    async def start(self):
        pass

    async def stop(self):
        pass

    async def generate(self, job):
        self.open += 1
        try:
            for number in range(self.num_words):
                await self.let.wait()
                await asyncio.sleep(self.pause)
                if self.fails is not None and number == self.num_words - 1:
                    raise self.fails
                yield Piece("word ", 1, "stop" if number == self.num_words - 1 else None)
        finally:
            self.open -= 1


def ask_app(app, work):
    async def whole():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await work(client)

    return asyncio.run(asyncio.wait_for(whole(), 20))


def complete(client, prompt="a b", **body):
    return client.post("/v1/completions", json={"prompt": prompt, **body})


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompt": "a " * 50}, 400, "has 50 tokens; this server takes 10"),
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": [1, 100]}, 400, "0 to 99"),
        ({"prompt": [-1]}, 400, "not valid"),
        ({"prompt": "a", "max_tokens": 21}, 400, "may have 20 tokens"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, 400, "max_tokens"),
        ({"prompt": "a", "n": 17}, 400, "n:"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p"),
        ({"prompt": "a", "stop": ""}, 400, "stop"),
        ({"prompt": "a", "user": ""}, 400, "user"),
        ({"prompt": "a", "user": "ann", "users": {"bo": 1}}, 400, "give one of them"),
        ({"prompt": "a", "users": {"bo": 2.5}}, 400, "users"),
        ({"prompt": "a", "user_strength": 3}, 400, "user_strength"),
        ({"prompt": "a", "user_profile": "tall"}, 400, "without profiles"),
        ({"prompt": "a", "presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"prompt": "a", "wrong": 1}, 400, "wrong"),
        ({"prompt": "a", "model": "gpt"}, 404, "one model here"),
        ({}, 400, "prompt"),
    ],
)
def test_a_request_that_cannot_be_answered_is_told_why(body, status, words):
    limits = Limits(max_prompt_tokens=10, max_tokens=20)
    answer = ask_app(create_app(SlowEngine(), limits=limits), lambda c: c.post("/v1/completions", json=body))
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_a_body_that_is_too_large_or_too_slow():
    app = create_app(SlowEngine(), limits=Limits(max_body_bytes=1000, max_body_seconds=0.05))

    async def in_parts(number, pause=0.0):
        for _ in range(number):
            await asyncio.sleep(pause)
            yield b'{"prompt": "aaa'

    async def work(client):
        kind = {"Content-Type": "application/json"}
        return [
            (await complete(client, "a" * 1000)).status_code,
            (await client.post("/v1/completions", content=in_parts(100), headers=kind)).status_code,
            (await client.post("/v1/completions", content=in_parts(3, 0.1), headers=kind)).status_code,
        ]

    assert ask_app(app, work) == [413, 413, 408]


def test_a_client_that_sends_too_much_reads_why(server):
    """Over a real connection: one that is closed while the client sends would be reset."""
    body = b'{"prompt": "' + b"a" * 3_000_000
    headers = {"Authorization": f"Bearer {server[2]['all']}", "Content-Type": "application/json"}
    for content in (body, iter([body[i : i + 50_000] for i in range(0, len(body), 50_000)])):
        answer = httpx.post(f"{server[0]}/v1/completions", content=content, headers=headers, timeout=30)
        assert answer.status_code == 413
        assert "larger than 1000000 bytes" in answer.json()["error"]["message"]


def test_no_answer_waits_for_the_clients_acknowledgement(server):
    """With Nagle's algorithm each takes at least 40 ms."""
    seconds = []
    with httpx.Client(base_url=server[0]) as client:
        for _ in range(21):
            start = time.perf_counter()
            client.get("/health")
            seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[5] < 0.02


def test_administrators_may_send_more(tmp_path):
    path = tmp_path / "keys.json"
    secrets = [add_key(path, "app", None), add_key(path, "root", None, is_admin=True)]
    app = create_app(SlowEngine(), KeyFile(path), Limits(max_body_bytes=1000, max_admin_body_bytes=3000))

    async def work(client):
        found = []
        for number, secret in [(1500, secrets[0]), (1500, secrets[1]), (4000, secrets[1])]:
            headers = {"Authorization": f"Bearer {secret}"}
            found.append(await client.post("/v1/users/remove", json={"user_ids": ["a" * number]}, headers=headers))
        return [answer.status_code for answer in found]

    assert ask_app(app, work) == [413, 400, 413]


def test_too_many_answers_at_once(tmp_path):
    path = tmp_path / "keys.json"
    headers = [{"Authorization": f"Bearer {add_key(path, name, None)}"} for name in ("one", "two")]
    engine = SlowEngine()
    app = create_app(engine, KeyFile(path), Limits(max_answers=3, max_answers_per_key=2))

    async def work(client):
        def ask(key, **body):
            return client.post("/v1/completions", json={"prompt": "a", **body}, headers=headers[key])

        first = asyncio.create_task(ask(0, n=2))
        while engine.open < 2:
            await asyncio.sleep(0.001)
        refused = [await ask(0), await ask(1, n=2)]
        engine.let.set()
        return [*refused, await first, await ask(0, n=2)]

    found = ask_app(app, work)
    assert [answer.status_code for answer in found] == [429, 503, 200, 200]
    assert found[1].headers["retry-after"] == "1"


def test_an_answer_that_takes_too_long():
    """Before the first word it has a status; in a stream that has begun, an event says so."""
    engine = SlowEngine(pause=0.2, num_words=3)

    async def work(client):
        engine.let.set()
        return await complete(client), await complete(client, stream=True)

    whole, streamed = ask_app(create_app(engine, limits=Limits(max_seconds=0.3)), work)
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
    assert streamed.status_code == 200
    assert '"code": "timeout"' in streamed.text
    assert "[DONE]" not in streamed.text
    assert engine.open == 0


@pytest.mark.parametrize("error", [EngineError("It failed."), KeyError("secret")])
def test_a_failing_engine_is_status_500_without_details(error):
    engine = SlowEngine(fails=error)

    async def work(client):
        engine.let.set()
        engine.num_words = 1
        first = await complete(client), await complete(client, stream=True)
        engine.num_words = 2
        return *first, await complete(client, stream=True)

    whole, streamed, begun = ask_app(create_app(engine), work)
    assert whole.status_code == streamed.status_code == 500
    assert begun.status_code == 200
    assert "server_error" in begun.text
    assert "secret" not in whole.text + streamed.text + begun.text


def test_health_says_when_the_engine_is_gone():
    engine = SlowEngine()
    engine.is_alive = False
    assert ask_app(create_app(engine), lambda client: client.get("/health")).status_code == 503


def test_clients_that_vanish_or_read_slowly_block_nobody():
    """Ten leave in the middle and ten never read; their answers are ended or go on beside, and others are answered."""
    engine, reference = make_engine(max_rows=12), make_engine()
    expected = generate_alone(reference, PROMPT, "user 1", 12)
    with serving(engine) as address:
        host, port = address.removeprefix("http://").split(":")
        kept = []
        for number in range(20):
            body = json.dumps(
                {"prompt": PROMPT, "user": "user 2", "max_tokens": 50, "stream": number % 2 == 0, "n": 3}
            )
            connection = socket.create_connection((host, int(port)))
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
            kept.append(connection)
            if number < 10:
                time.sleep(0.01)
                connection.close()
        slow = socket.create_connection((host, int(port)))
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le")
        body = {"prompt": PROMPT, "user": "user 1", **GREEDY}
        for _ in range(3):
            answer = httpx.post(f"{address}/v1/completions", json=body, timeout=20)
            assert answer.json()["choices"][0]["text"] == expected
        deadline = time.monotonic() + 10
        while engine.gauges()["running"] + engine.gauges()["waiting"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.gauges() == {"running": 0, "batches": 0, "waiting": 0}
        for connection in [*kept, slow]:
            connection.close()


def test_a_stop_finishes_what_was_begun():
    engine, reference = make_engine(), make_engine()
    expected = generate_alone(reference, PROMPT, "user 1", 50)
    with ThreadPoolExecutor() as pool, serving(engine) as address:
        body = {"prompt": PROMPT, "user": "user 1", "temperature": 0, "max_tokens": 50}
        asked = pool.submit(httpx.post, f"{address}/v1/completions", json=body, timeout=30)
        while not engine.gauges()["running"] and not asked.done():
            time.sleep(0.001)
    assert asked.result().json()["choices"][0]["text"] == expected
    assert not engine.is_alive


# --- What is told about it --------------------------------------------------------------------------------------------


def test_no_user_and_no_text_in_the_log_or_the_metrics(server, caplog):
    caplog.set_level(logging.DEBUG)
    secret = "eve-who-must-not-be-named"
    for logger in ("trl_personal", "uvicorn.error"):
        logging.getLogger(logger).setLevel(logging.DEBUG)
    post(server, {"prompt": f"{PROMPT} {secret}", "user": secret, "max_tokens": 2})
    post(server, {"prompt": PROMPT, "user": secret, "wrong": secret})
    post(server, {"prompt": PROMPT, "user": secret}, key="app")
    httpx.get(f"{server[0]}/v1/{secret}?user={secret}")
    metrics = httpx.get(f"{server[0]}/metrics", headers={"Authorization": f"Bearer {server[2]['all']}"}).text
    lines = [
        record.getMessage() for record in caplog.records if record.name.startswith(("trl_personal", "uvicorn.error"))
    ]
    assert any("POST /v1/completions 200" in line for line in lines)
    assert any("GET other 404" in line for line in lines)
    assert secret not in metrics + "".join(lines)
    assert PROMPT not in "".join(lines)


def test_metrics_count(server):
    def read():
        text = httpx.get(f"{server[0]}/metrics", headers={"Authorization": f"Bearer {server[2]['all']}"}).text
        return Counter(
            {
                name: float(value)
                for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
            }
        )

    before = read()
    post(server, {"prompt": PROMPT, "user": "user 1", "max_tokens": 4, "temperature": 0, "n": 2})
    post(server, {"prompt": PROMPT, "user": "nobody", "max_tokens": 0})
    after = read()
    after.subtract(before)
    assert after['trl_personal_requests_total{route="/v1/completions",status="200"}'] == 1
    assert after['trl_personal_requests_total{route="/v1/completions",status="400"}'] == 1
    assert after['trl_personal_answers_total{answered_for="user"}'] == 2
    assert after["trl_personal_prompt_tokens_total"] == 10
    assert after["trl_personal_wait_seconds_count"] == 2
    assert 2 <= after["trl_personal_answer_tokens_total"] <= 8
    assert read()["trl_personal_users"] == 16


def test_a_request_has_an_id(server):
    given = post(server, {"prompt": PROMPT, "max_tokens": 1}, **{"X-Request-Id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    assert given.json()["id"] == "cmpl-mine-1"
    made = post(server, {"prompt": PROMPT, "max_tokens": 0}, **{"X-Request-Id": "no \t spaces"})
    assert len(made.headers["x-request-id"]) == 32


def test_the_server_runs_without_the_rest_of_the_package():
    """trl, peft, transformers and datasets may be missing, or of versions that this package does not take."""
    code = """
        import sys

        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("trl", "peft", "transformers", "datasets", "accelerate"):
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Missing())
        import trl_personal, trl_personal.serving.run, trl_personal.serving.keys
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys, monkeypatch):
    assert main(["serve", str(tmp_path / "none")]) == 1
    assert "There is no folder" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--host", "0.0.0.0"]) == 1
    assert "Make a key" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--keys", str(tmp_path / "keys.json")]) == 1
    assert "There is no keys.json" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(tmp_path), "--port", str(taken.getsockname()[1])]) == 1
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err
    assert main(["serve", str(tmp_path)]) == 1
    assert "not a personalized model" in capsys.readouterr().err
    for name in [name for name in sys.modules if name.startswith("trl_personal.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", str(tmp_path)]) == 1
    assert "pip install trl-personal[serve]" in capsys.readouterr().err


# --- Users who come and go --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A saved model with 16 users."""
    engine = make_engine()
    engine.model.save_pretrained(tmp_path / "out")
    engine._tokenizer.save_pretrained(tmp_path / "out")
    return tmp_path / "out"


def admin(client, route, **body):
    return client.post(f"/v1/users/{route}", json=body, timeout=60)


def test_users_leave_and_take_their_rows_along(folder, tmp_path):
    """A user who has left is unknown at once and after a restart, and is back after an import."""
    path = tmp_path / "keys.json"
    headers = {"Authorization": f"Bearer {add_key(path, 'root', None, is_admin=True)}"}
    ask = {"prompt": PROMPT, "user": "user 3", **GREEDY}
    found = []
    for number in range(2):
        engine = load_engine(str(folder))
        with serving(engine, KeyFile(path)) as address, httpx.Client(base_url=address, headers=headers) as client:
            if number == 0:
                found.append(client.post("/v1/completions", json=ask).json())
                rows = admin(client, "export", user_ids=["user 3"])
                assert rows.headers["content-type"] == "application/octet-stream"
                (tmp_path / "rows.safetensors").write_bytes(rows.content)
                unknown = admin(client, "remove", user_ids=["nobody"])
                assert unknown.status_code == 400
                gone = admin(client, "remove", user_ids=["user 3"]).json()
                assert gone == {"num_removed": 1, "num_users": 15, "is_saved": True}
            found.append(client.post("/v1/completions", json=ask).json())
    assert [answer["answered_for"] for answer in found] == ["user", "unknown", "unknown"]
    assert found[1]["choices"] == found[2]["choices"] != found[0]["choices"]
    model = AutoPersonalizedModelForCausalLM.from_pretrained(folder)
    model.import_users(tmp_path / "rows.safetensors")
    reference = make_engine()
    reference.model = model
    assert generate_alone(reference, PROMPT, "user 3", 12) == found[0]["choices"][0]["text"]


def test_users_who_joined_in_the_folder_meanwhile_are_not_lost(folder):
    engine = load_engine(str(folder), ref_model=str(folder))
    users, config = load_known_users(folder)
    write_known_users(folder, users.copied("user 1", "zoe"), config)  # as `trl-personal users copy` does
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for change in (lambda: engine.admin.remove_users(["user 3"]), lambda: engine.admin.add_users([], ["eve"])):
        with pytest.raises(RequestError, match="changed by somebody else since the server read them"):
            change()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not engine.knows("zoe")
    assert engine.knows("user 3")


def test_users_join_and_are_updated_while_others_are_answered(folder, tmp_path):
    path = tmp_path / "keys.json"
    headers = {"Authorization": f"Bearer {add_key(path, 'root', None, is_admin=True)}"}
    expected = generate_alone(make_engine(), PROMPT, "user 1", 12)
    pairs = [{"user_id": "eve", "prompt": PROMPT, "chosen": " yes", "rejected": " no no"} for _ in range(6)]
    engine = load_engine(str(folder), ref_model=str(folder))
    with serving(engine, KeyFile(path)) as address, httpx.Client(base_url=address, headers=headers) as client:
        with ThreadPoolExecutor() as pool:
            joining = pool.submit(admin, client, "join", pairs=pairs, user_ids=["zoe"])
            beside = []
            while not joining.done():
                answer = client.post("/v1/completions", json={"prompt": PROMPT, "user": "user 1", **GREEDY})
                beside.append(answer.json()["choices"][0]["text"])
        joined = joining.result().json()
        assert (joined["num_users"], [user["user_id"] for user in joined["users"]]) == (18, ["zoe", "eve"])
        assert set(beside) == {expected}
        updated = admin(client, "update", pairs=pairs).json()
        assert updated["num_users"] == 18
        assert admin(client, "join", pairs=pairs).status_code == 400
        answer = client.post("/v1/completions", json={"prompt": PROMPT, "user": "eve", **GREEDY}).json()
        assert answer["answered_for"] == "user"
    saved = AutoPersonalizedModelForCausalLM.from_pretrained(folder)
    assert [*saved.user_vocab][16:] == ["zoe", "eve"]
