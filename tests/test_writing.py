"""The one loop that writes answers: batch by batch, in order, for each user as the model alone would."""

import pytest
import torch

from trl_personal.writing import Request, write_answers


OPTIONS = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture
def model(make_trainer):
    trainer = make_trainer("llama")
    with torch.no_grad():
        for parameter in trainer.user_model.parameters():
            parameter.normal_(std=2, generator=torch.Generator().manual_seed(0))
    return trainer.model


def test_answers_come_one_batch_at_a_time(model, tokenizer, monkeypatch):
    requests = [
        Request(user_id, prompt) for user_id in ("ann", None) for prompt in ("the story", "yes", "i like dogs")
    ]
    requests = requests[:5]
    calls, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: calls.append(kwargs["user_ids"]) or generate(**kwargs))
    batches = write_answers(model, tokenizer, requests, batch_size=2, **OPTIONS)
    first = next(batches)
    assert (len(first), calls) == (2, [["ann", "ann"]])  # nothing is written ahead
    texts = [*first, *(text for batch in batches for text in batch)]
    assert calls == [["ann", "ann"], ["ann", None], [None]]
    for request, text in zip(requests, texts, strict=True):
        inputs = tokenizer(request.prompt, return_tensors="pt")
        ids = generate(**inputs, user_ids=[request.user_id], **OPTIONS)[0, inputs["input_ids"].shape[1] :]
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert texts[0] != texts[3]  # the same prompt, for ann and for the generic user


def test_the_tokenizer_pads_on_the_left_whatever_its_own_side(model, tokenizer):
    requests = [Request("ann", "the story"), Request("bo", "please write a story")]
    expected = list(write_answers(model, tokenizer, requests, **OPTIONS))
    tokenizer.padding_side = "right"
    assert list(write_answers(model, tokenizer, requests, **OPTIONS)) == expected


def test_text_becomes_a_message_where_the_template_is_used(model, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} the end {% endfor %}"
    chat = [Request("ann", "yes"), Request("ann", [{"role": "user", "content": "yes"}])]
    (texts,) = write_answers(model, tokenizer, chat, use_template=True, **OPTIONS)
    (plain,) = write_answers(model, tokenizer, [Request("ann", "yes the end ")], **OPTIONS)
    assert texts == plain * 2
    with pytest.raises(ValueError, match="needs a chat template"):
        next(write_answers(model, tokenizer, chat, **OPTIONS))
