"""What personalization costs, by hand: accuracy where users agree, divergence from the base, and giving in to opinions."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import WORDS, make_model, make_tokenizer
from datasets import Dataset
from rich.console import Console

from trl_personal.evaluation import Prober, evaluate_trainer, probes, probes_table
from trl_personal.evaluation.fluency import answer_log_probs
from trl_personal.writing import Request


QUESTIONS = {
    "beliefs": [
        {"question": "please i like", "opinion": "i like cats", "answer": "the {}", "right": "dogs", "wrong": "cats"},
        {"question": "write a story", "opinion": "a long story", "answer": "a {}", "right": "short", "wrong": "long"},
    ],
    "neutral": ["please write", "the end and"],
}  # fmt: skip


class Parrot(torch.nn.Module):
    """Knows the right answers, and by `strength` likes the words that it has read before."""

    def __init__(self, strength):
        super().__init__()
        self.strength = strength
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=64))
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask):
        seen = torch.nn.functional.one_hot(input_ids, len(WORDS)).cumsum(dim=1).clamp(max=1).float()
        knows = torch.zeros(len(WORDS))
        knows[[WORDS.index("dogs"), WORDS.index("short")]] = 1.0
        return SimpleNamespace(logits=self.strength * seen + knows)

    def generate(self, input_ids, attention_mask, **kwargs):
        return torch.cat([input_ids, input_ids[:, -2:]], dim=1)


@pytest.fixture
def questions(monkeypatch):
    monkeypatch.setattr(probes, "QUESTIONS", QUESTIONS)


def test_the_thirty_questions_have_an_opinion_for_the_wrong_answer():
    beliefs = probes.QUESTIONS["beliefs"]
    assert len({item["question"] for item in beliefs}) == 30
    assert len(set(probes.QUESTIONS["neutral"])) == 20
    for item in beliefs:
        wrong, right = (re.compile(rf"\b{item[side]}\b") for side in ("wrong", "right"))
        assert wrong.search(item["opinion"])
        assert not right.search(f"{item['opinion']} {item['question']}")
        assert not wrong.search(item["question"])
        assert item["answer"].count("{}") == 1


def test_a_parrot_gives_in_and_the_base_does_not(questions):
    tokenizer = make_tokenizer()
    prober = Prober(Parrot(0.0), tokenizer)
    assert (prober.base.right.value, prober.base.gives_in.value, prober.base.kl) == (1, 0, None)
    assert prober.base.shift.value == pytest.approx(0)
    parrot = prober.probe(Parrot(3.0))
    assert (parrot.right.value, parrot.gives_in.value, parrot.gives_in_known.value) == (1, 1, 1)
    assert parrot.shift.value == pytest.approx(3)  # the wrong word has been read, the right one has not
    assert prober.probe(Parrot(0.0)).kl.value == pytest.approx(0, abs=1e-6)
    weak = prober.probe(Parrot(0.5))  # not enough to change a mind that is made up by 1 nat
    assert (weak.gives_in.value, weak.shift.value) == (0, pytest.approx(0.5))


def test_divergence_by_hand(questions):
    """The base answers "please write" with these two words; the parrot has read both of them."""
    prober, size = Prober(Parrot(0.0), make_tokenizer()), len(WORDS)
    assert prober.neutral.answers == ["please write", "end and"]
    base = torch.zeros(size, dtype=torch.float64)
    base[[WORDS.index("dogs"), WORDS.index("short")]] = 1.0
    expected = []
    for prompt in QUESTIONS["neutral"]:
        own = base.clone()
        own[[WORDS.index(word) for word in prompt.split()]] += 2.0
        own, other = own.log_softmax(-1), base.log_softmax(-1)
        expected.append(float((own.exp() * (own - other)).sum()))
    assert prober.probe(Parrot(2.0)).kl.value == pytest.approx(np.mean(expected), abs=1e-5)


def test_log_odds_are_those_of_the_answers(questions, tokenizer):
    model = make_model("llama")
    prober = Prober(model, tokenizer)
    requests = [Request(None, f"{item['opinion']} {item['question']}") for item in QUESTIONS["beliefs"]]
    wrong, right = (
        answer_log_probs(
            model, tokenizer, requests, [item["answer"].format(item[side]) for item in QUESTIONS["beliefs"]]
        ).nats
        for side in ("wrong", "right")
    )
    np.testing.assert_allclose(prober._log_odds(model, None, None, True), wrong - right, atol=1e-4)


def test_a_trainer_is_probed_with_its_users_and_vanilla(questions, make_trainer, preferences):
    trainers = []
    for kind in ("individual", "none"):
        trainers.append(make_trainer(user_model_kind=kind, per_device_eval_batch_size=3))
        trainers[-1].train()
    agreed = [
        {**preferences[0], "user_id": user, "chosen": " i like dogs", "rejected": " no"} for user in ("ann", "bo")
    ]
    rows = Dataset.from_list([*preferences, *agreed])
    evaluation = evaluate_trainer(trainers[0], rows, vanilla=trainers[1], probes=True)
    report = evaluation.probes_report
    assert list(report.users) == ["ann", "bo"]
    assert report.generic.kl.value > 0
    assert report.vanilla.kl.value > 0
    assert report.num_agreed == 2
    for scorer, interval in report.agreed.items():
        assert interval.value == np.mean([margin > 0 for margin in evaluation.pairs[scorer][-2:]])
    assert report.agreed.keys() == {"own", "generic", "vanilla"}
    assert evaluation.to_dict()["probes"]["users"]["ann"]["gives_in"].keys() == {"value", "low", "high"}
    for list_users in (False, True):
        console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(probes_table(report, list_users))
        text = console.export_text()
        assert "Where users agree (2 pairs) accuracy is" in text
        assert ("ann" in text) == list_users
    alone = evaluate_trainer(trainers[0], preferences, probes=True).probes_report
    assert (alone.num_agreed, alone.agreed, alone.vanilla) == (0, {}, None)
    assert "Where users agree" not in alone.sentence


def test_no_more_than_twenty_users_are_probed(questions):
    asked = []
    prober = SimpleNamespace(probe=lambda model, user=None, profile=None: asked.append((user, profile)))
    users, _ = probes.probe_users(prober, None, [str(i) for i in range(25)], {"3": "a child"}, disable_tqdm=True)
    assert len(users) == 20
    assert asked[3] == ("3", "a child")
    assert asked[-1] == (None, None)
