"""Log probabilities of answers, equal to those of a direct call, and the reference policy: what training started from."""

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer

from trl_personal import AutoPersonalizedModelForCausalLM, UserVocab, attach_user_model, detach_user_model
from trl_personal.evaluation import answers_by_user, base_answers, nats_per_token, reference_policy, with_wish
from trl_personal.evaluation.answer_features import ANSWER_FEATURES, answer_features, check_answers, describe_answers
from trl_personal.evaluation.fluency import answer_log_probs
from trl_personal.models.saving import is_personalized
from trl_personal.user_models import IndividualUserModel, UserModelConfig
from trl_personal.writing import Request


PROMPTS = ["please write a story", "the story", "i like dogs and"]
ANSWERS = ["the end", "yes no i like cats", ""]
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}answer {% endif %}"
)


def direct(model, tokenizer, prompt, answer, **kwargs):
    """Log probabilities of an answer's tokens, from one unpadded row."""
    start, end = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([start + end]), **kwargs).logits[0].double().log_softmax(-1)
    return np.array([float(logits[len(start) + i - 1, token]) for i, token in enumerate(end)])


def with_users(seed=0):
    model = make_model("llama", seed)
    torch.manual_seed(seed)
    users = IndividualUserModel(UserModelConfig(num_users=2, num_virtual_tokens=3, token_dim=32))
    for parameter in users.parameters():
        parameter.data.normal_(0, 0.5)
    attach_user_model(model, users, UserVocab(["ann", "bo"]))
    return model


def test_log_probs_equal_those_of_single_rows(tokenizer):
    model = make_model("llama")
    scores = answer_log_probs(model, tokenizer, [Request(None, prompt) for prompt in PROMPTS], ANSWERS, batch_size=2)
    expected = [direct(model, tokenizer, prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    np.testing.assert_allclose(scores.nats, [found.sum() for found in expected], atol=1e-4)
    assert scores.num_tokens.tolist() == [2, 5, 0]
    np.testing.assert_allclose(scores.nats_per_token[:2], [-found.mean() for found in expected[:2]], atol=1e-4)
    assert np.isnan(scores.nats_per_token[2])


def test_batches_are_smaller_where_logits_would_be_too_many(tokenizer, monkeypatch):
    model, requests = make_model("llama"), [Request(None, prompt) for prompt in PROMPTS]
    expected = answer_log_probs(model, tokenizer, requests, ANSWERS)
    monkeypatch.setattr("trl_personal.evaluation.fluency.MAX_LOGITS", 1)
    sizes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    np.testing.assert_allclose(answer_log_probs(model, tokenizer, requests, ANSWERS).nats, expected.nats, atol=1e-4)
    assert sizes == [1, 1]


def test_each_request_is_scored_for_its_user(tokenizer):
    model = with_users()
    users = ["bo", None, "ann", "nobody"]
    scores = answer_log_probs(model, tokenizer, [Request(user, PROMPTS[0]) for user in users], ["the end"] * 4)
    for user, nats in zip([2, 0, 1, 0], scores.nats, strict=True):
        expected = direct(model, tokenizer, PROMPTS[0], "the end", user_indices=torch.tensor([user])).sum()
        assert nats == pytest.approx(expected, abs=1e-4)
    assert len(set(np.round(scores.nats, 3))) == 3


def test_a_conversation_is_scored_behind_its_template():
    model, tokenizer = make_model("llama"), make_tokenizer(add_bos=True)
    tokenizer.chat_template = "<bos> " + TEMPLATE
    chat = [{"role": "user", "content": "the story"}]
    found = nats_per_token(model, tokenizer, [chat], ["the end"], wish="please short")
    tokenizer.chat_template = None
    plain = make_tokenizer()
    expected = direct(model, plain, "<bos> please short the story answer", "the end")
    np.testing.assert_allclose(found, [-expected.mean()], atol=1e-4)


def test_what_does_not_fit_the_positions_is_not_scored(tokenizer):
    model = with_users()  # 64 positions, of which three are virtual
    scores = answer_log_probs(model, tokenizer, [Request("ann", "the " * 59)], ["yes no i like"])
    assert scores.num_tokens.tolist() == [2]


@pytest.mark.parametrize("lora", [True, False])
def test_the_reference_policy_is_the_model_that_training_started_from(make_trainer, lora):
    trainer = make_trainer("llama", lora=lora)
    trainer.train()
    start, tokenizer = make_model("llama"), trainer._tokenizer
    options = {"max_new_tokens": 6, "do_sample": False}
    before = answers_by_user(trainer.model, tokenizer, PROMPTS, ["ann", None], **options)
    expected = answers_by_user(start, tokenizer, PROMPTS, [None], **options)[None]
    with reference_policy(trainer) as reference:
        assert base_answers(reference, tokenizer, PROMPTS, **options) == {None: expected}
        found = nats_per_token(reference, tokenizer, PROMPTS, expected)
    np.testing.assert_allclose(found, nats_per_token(start, tokenizer, PROMPTS, expected), atol=1e-4)
    assert is_personalized(trainer.model)
    assert answers_by_user(trainer.model, tokenizer, PROMPTS, ["ann", None], **options) == before


def test_training_that_goes_on_from_an_adapter_has_that_adapter_as_its_reference(make_trainer, tmp_path):
    first = make_trainer("llama", lora=True)
    first.train()
    first.save_model(str(tmp_path / "first"))
    tokenizer = first._tokenizer
    detach_user_model(first.model)
    expected = nats_per_token(first.model, tokenizer, PROMPTS, ANSWERS)
    model = AutoPersonalizedModelForCausalLM.from_pretrained(str(tmp_path / "first"), is_trainable=True)
    second = make_trainer("llama", trainer_kwargs={"model": model, "processing_class": tokenizer})
    second.train()
    assert "ref" in second.model.peft_config
    with reference_policy(second) as reference:
        found = nats_per_token(reference, tokenizer, PROMPTS, ANSWERS)
    np.testing.assert_allclose(found[:2], expected[:2], atol=1e-4)
    assert second.model.active_adapter == "default"
    detach_user_model(second.model)
    assert not np.allclose(nats_per_token(second.model, tokenizer, PROMPTS, ANSWERS)[:2], expected[:2], atol=1e-3)


def test_users_with_one_wish_share_the_bases_answers(tokenizer):
    model = make_model("llama")
    wishes = {"ann": "please short", "bo": " please short ", "cy": None}
    found = base_answers(model, tokenizer, PROMPTS, wishes, max_new_tokens=4, do_sample=False)
    assert found["ann"] == found["bo"]
    assert found["cy"] == found[None]
    wished = [with_wish(prompt, "please short") for prompt in PROMPTS]
    expected = answers_by_user(model, tokenizer, wished, [None], max_new_tokens=4, do_sample=False)[None]
    assert found["ann"] == expected


def test_features_have_a_column_for_each_name():
    features = answer_features(["no no no", "one two"], ["p", "p"])
    assert features.shape == (2, len(ANSWER_FEATURES))
    assert features[:, -1].tolist() == [0.5, 0.0]
    assert features[0, 0] == np.log(4)
    assert describe_answers(["a b", "a b c"])["distinct_2"] == 2 / 3
    assert describe_answers(["a"], [float("nan")])["nats_per_token"] is None
    with pytest.raises(ValueError, match="one answer to each of 2 prompts; found other numbers: {'ann': 1}"):
        check_answers({"ann": ["a"], "bo": ["a", "b"]}, 2)
