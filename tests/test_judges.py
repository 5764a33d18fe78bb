"""Judges: a function, a reward model, an endpoint on this machine; and win rates, by hand and controlled for length."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from conftest import LLAMA_SIZES, make_tokenizer
from rich.console import Console
from scipy.special import expit, logit
from transformers import AutoModelForSequenceClassification, LlamaConfig

from trl_personal.evaluation import judge_answers, judge_table, length_controlled, make_judge
from trl_personal.evaluation.judges import read_reply


PROMPTS = [f"question {number}" for number in range(20)]


def prefers_longer(prompts, pairs):
    return [-1 if len(a) == len(b) else int(len(b) > len(a)) for a, b in pairs]


# --- Win rates ----------------------------------------------------------------------------------------------------------


def test_wins_against_the_generic_user_by_hand():
    answers = {"ann": ["yes yes", "no", "so"], "bo": ["y", "n", "s"], None: ["yes", "no", "so so"]}
    report = judge_answers(prefers_longer, ["p", "q", "r"], answers)
    ann, bo = report.users["ann"], report.users["bo"]
    assert (ann.wins, ann.losses, ann.ties, ann.rate.value) == (1, 1, 1, 0.5)
    assert (bo.wins, bo.losses, bo.ties, bo.rate.value) == (0, 3, 0, 0)
    assert report.mean.value == 0.25
    assert report.to_dict()["users"]["ann"]["length_controlled"].keys() == {"value", "low", "high"}
    with pytest.raises(ValueError, match="needs the answers of at least one user and, under `None`"):
        judge_answers(prefers_longer, ["p"], {"ann": ["a"]})


def test_a_judge_reads_the_wish_and_the_last_message():
    seen = []

    def judge(prompts, pairs):
        seen.append(prompts)
        return [0] * len(pairs)

    chat = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Why?"},
    ]
    judge_answers(judge, [chat], {"ann": ["a"], "bo": ["b"], None: ["c"]}, wishes={"ann": "Be brief."})
    assert seen == [["Be brief. Why?"]] * 2 + [["Why?"]] * 2


def test_table_names_no_user_unless_asked():
    report = judge_answers(prefers_longer, ["p"], {"ann": ["yes"], None: ["no"]}, name="A ruler")
    for list_users in (False, True):
        console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(judge_table(report, list_users))
        text = console.export_text()
        assert "A ruler prefers users' answers" in text
        assert ("ann" in text) == list_users


def test_without_differences_in_length_the_rate_is_that_of_the_prior_and_the_judgements():
    """One user, answers of one length: theta is where the likelihood's slope meets the prior's."""
    points = [1.0] * 15 + [0.0] * 5
    rates, mean = length_controlled({"ann": points}, {"ann": ["one two"] * 20}, {"ann": ["three four"] * 20})
    theta = logit(rates["ann"].value)
    assert 20 * expit(theta) - 15 + theta / 1.5**2 == pytest.approx(0, abs=1e-4)
    assert 0.45 < rates["ann"].low < rates["ann"].value < 0.75
    assert mean.value == pytest.approx(rates["ann"].value)


TRUE = {"ann": 0.8, "bo": 0.35}


def judgements(seed, num_prompts):
    """By a judge with a taste for length: `ann` writes twelve words more than the generic user, `bo` twelve less."""
    rng = np.random.default_rng(seed)
    words = {user: rng.integers(20, 60, num_prompts) for user in [*TRUE, None]}
    words["ann"], words["bo"] = words["ann"] + 12, words["bo"] - 12
    differences = {user: words[user] - words[None] for user in TRUE}
    scale = np.sqrt(np.mean([difference**2 for difference in differences.values()]))
    points = {}
    for user, rate in TRUE.items():
        chance = expit(logit(rate) + 1.5 * np.tanh(differences[user] / scale))
        points[user] = (rng.random(num_prompts) < chance).astype(float).tolist()
    texts = {user: ["w " * n for n in found] for user, found in words.items()}
    return points, length_controlled(points, texts, dict.fromkeys(TRUE, texts[None]))


def test_rates_that_generated_the_judgements_are_found():
    """Many judgements: the true rates at one length lie within the intervals, the raw ones do not."""
    points, (rates, _) = judgements(seed=1, num_prompts=400)
    for user, rate in TRUE.items():
        assert rates[user].low < rate < rates[user].high
        assert rates[user].high - rates[user].low < 0.15
    assert np.mean(points["ann"]) > rates["ann"].high
    assert np.mean(points["bo"]) < rates["bo"].low


def test_intervals_hold_the_true_rates_as_often_as_they_say():
    held = []
    for seed in range(200):
        _, (rates, mean) = judgements(seed, num_prompts=20)
        held.append([rates[user].low <= rate <= rates[user].high for user, rate in TRUE.items()])
        held[-1].append(mean.low <= np.mean(list(TRUE.values())) <= mean.high)
    assert (0.92 <= np.mean(held, axis=0)).all()


# --- Judges by name -----------------------------------------------------------------------------------------------------


def test_a_function_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "own_judges.py").write_text(
        "def shorter(prompts, pairs):\n    return [int(len(b) < len(a)) for a, b in pairs]\nx = 1\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert make_judge("own_judges:shorter")(["p"], [["long", "no"]]) == [1]
    assert sys.path == before
    with pytest.raises(ValueError, match="own_judges has no function `x`"):
        make_judge("own_judges:x")
    with pytest.raises(ImportError):
        make_judge("no_such_module:judge")
    for name in ("best", "openai:", "a b:c", "reward"):
        with pytest.raises(
            ValueError, match="There is no judge '.*'. Give a function `package.module:name`, a reward model"
        ):
            make_judge(name)


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"])
def test_a_reward_model_takes_the_higher_reward(tmp_path, template):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        LlamaConfig(**LLAMA_SIZES | {"vocab_size": 500}, num_labels=1)
    ).eval()
    tokenizer = make_tokenizer(family="qwen2")
    tokenizer.chat_template = template
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    prompts, pairs = ["the story", "please write"], [["yes", "no i like"], ["dogs", "dogs"]]
    judge = make_judge(f"reward:{tmp_path / 'reward'}")
    glue = " " if template else "\n\n"
    with torch.no_grad():
        rewards = [
            float(model(**tokenizer(prompts[0] + glue + answer + (" " if template else ""), return_tensors="pt")).logits)
            for answer in pairs[0]
        ]  # fmt: skip
    assert rewards[0] != rewards[1]
    assert judge(prompts, pairs) == [int(rewards[1] > rewards[0]), -1]
    several = AutoModelForSequenceClassification.from_config(LlamaConfig(**LLAMA_SIZES, num_labels=3))
    several.save_pretrained(tmp_path / "several")
    tokenizer.save_pretrained(tmp_path / "several")
    with pytest.raises(ValueError, match="has 3 outputs, so which of them is the reward is not known"):
        make_judge(f"reward:{tmp_path / 'several'}")


# --- An endpoint --------------------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint():
    """A server of chat completions on this machine, which replies what `replies(text)` says, and keeps what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers["Authorization"], request))
            content = Handler.replies(request["messages"][0]["content"])
            body = json.dumps(
                {
                    "id": "1", "object": "chat.completion", "created": 0, "model": request["model"],
                    "choices": [
                        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
                    ],
                }
            ).encode()  # fmt: skip
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", Handler, asked
    server.shutdown()
    server.server_close()


def longer_of_two(text):
    first, second = text.split("Answer A:\n")[1].split("\n\nWhich")[0].split("\n\nAnswer B:\n")
    return "A" if len(first) > len(second) else "**B**" if len(second) > len(first) else "Tie."


def test_an_endpoint_is_asked_in_both_orders(endpoint, monkeypatch):
    pytest.importorskip("openai")
    url, handler, asked = endpoint
    handler.replies = staticmethod(longer_of_two)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    answers = {"ann": ["yes yes", "no", "so"], None: ["yes", "no no", "it"]}
    report = judge_answers(make_judge("openai:some-model", url), ["p", "q", "r"], answers)
    assert (report.users["ann"].wins, report.users["ann"].losses, report.users["ann"].ties) == (1, 1, 1)
    assert len(asked) == 6
    path, key, request = asked[0]
    assert (path, key, request["model"], request["temperature"]) == (
        "/v1/chat/completions",
        "Bearer secret",
        "some-model",
        0,
    )
    handler.replies = staticmethod(lambda text: "I cannot say.")
    with pytest.raises(ValueError, match="3 of 3 replies of some-model say neither A, B nor TIE"):
        make_judge("openai:some-model", url)(["p"] * 3, [["a", "b"]] * 3)


def test_the_endpoint_may_come_from_the_environment_and_needs_no_key_then(endpoint, monkeypatch):
    pytest.importorskip("openai")
    url, handler, asked = endpoint
    handler.replies = staticmethod(lambda text: "B")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="There is no key for OpenAI's endpoint"):
        make_judge("openai:some-model")
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    assert make_judge("openai:some-model")(["p"], [["a", "b"]]) == [1]
    assert asked[0][1] == "Bearer none"


def test_a_missing_package_is_told_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r'`pip install "trl-personal\[judge\]"`'):
        make_judge("openai:some-model", "http://localhost/v1")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("A", 0), (" B.", 1), ("TIE", -1), ("Answer B", 1), ("A or B?", None), ("", None), (None, None), ("a", None),
     ("A is short, B is long.\n\n**B**", 1)],
)  # fmt: skip
def test_replies_are_read_strictly(reply, expected):
    assert read_reply(reply) == expected
