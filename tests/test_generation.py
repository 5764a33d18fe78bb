"""Text for a batch of users: batched equals one by one, and virtual tokens never show."""

import logging
import subprocess
import sys

import pytest
import torch
from conftest import CONFIGS, ROOT, make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounter
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    pipeline,
)

from trl_personal import (
    AutoPersonalizedModelForCausalLM,
    IndividualUserModel,
    UserModelConfig,
    UserVocab,
    attach_user_model,
)


PROMPTS = ["<bos> please write a story the end", "short", "<bos> i like dogs", "yes no yes no"]
USERS = ["ann", "bo", "cy", "ann"]
NEW_TOKENS = 8


def personalize(model, num_virtual_tokens=3):
    torch.manual_seed(5)
    user_model = IndividualUserModel(UserModelConfig(3, num_virtual_tokens, 32))
    user_model.generic_prompt.data.normal_()
    user_model.user_offsets.weight.data[1:].normal_(std=2)
    attach_user_model(model, user_model, UserVocab(["ann", "bo", "cy"]))
    model.generation_config.eos_token_id = None  # fixed lengths, so that tokens can be compared
    return model


@pytest.fixture(params=[*sorted(CONFIGS), "peft"])
def model(request):
    if request.param != "peft":
        return personalize(make_model(request.param))
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return personalize(get_peft_model(make_model("llama"), lora).eval())


@pytest.fixture
def batch(tokenizer):
    return tokenizer(PROMPTS, padding=True, return_tensors="pt")


def one_by_one(model, tokenizer, **kwargs):
    rows = []
    for prompt, user in zip(PROMPTS, USERS, strict=True):
        inputs = tokenizer([prompt], return_tensors="pt")
        sequence = model.generate(**inputs, user_ids=[user], max_new_tokens=NEW_TOKENS, do_sample=False, **kwargs)
        rows.append(sequence[0, inputs["input_ids"].shape[1] :])
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 3},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_batched_equals_one_by_one(model, tokenizer, batch, options):
    sequences = model.generate(**batch, user_ids=USERS, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    length = batch["input_ids"].shape[1]
    assert torch.equal(sequences[:, :length], batch["input_ids"])
    assert sequences.shape == (4, length + NEW_TOKENS)
    assert torch.equal(sequences[:, length:], one_by_one(model, tokenizer, **options))


def test_greedy_tokens_are_those_of_repeated_forward_passes(model, batch):
    """No cache, no padding, no `generate`: argmax of the conditioned logits, again and again."""
    sequences = model.generate(**batch, user_ids=USERS, max_new_tokens=NEW_TOKENS, do_sample=False)
    for row, user in enumerate(USERS):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        index = torch.tensor(model.user_vocab.encode([user]))
        for _ in range(NEW_TOKENS):
            next_id = model(ids, user_indices=index).logits[0, -1].argmax()
            ids = torch.cat([ids, next_id.view(1, 1)], dim=1)
        assert torch.equal(sequences[row, -NEW_TOKENS:], ids[0, -NEW_TOKENS:])


def test_repetition_penalty_sees_the_prompt(model, tokenizer):
    inputs = tokenizer(["please write a story"], return_tensors="pt")
    penalized = model.generate(
        **inputs,
        user_ids="ann",
        max_new_tokens=1,
        repetition_penalty=1e6,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    ).scores[0][0]
    plain = model.generate(
        **inputs, user_ids="ann", max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_scores=True
    ).scores[0][0]
    changed = (penalized != plain).nonzero().flatten().tolist()
    pad = model.generation_config.pad_token_id
    assert set(changed) - {pad} == set(inputs["input_ids"][0].tolist())


def test_padding_that_is_also_eos_is_not_penalized(tokenizer):
    model = personalize(make_model("llama"))
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 2
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    outputs = model.generate(
        **batch,
        user_ids=USERS,
        max_new_tokens=1,
        repetition_penalty=5.0,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for row, (prompt, user) in enumerate(zip(PROMPTS, USERS, strict=True)):
        alone = model.generate(
            **tokenizer([prompt], return_tensors="pt"),
            user_ids=user,
            max_new_tokens=1,
            repetition_penalty=5.0,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        torch.testing.assert_close(outputs.scores[0][row], alone.scores[0][0], rtol=1e-4, atol=1e-4)


def test_users_write_differently_and_unknown_is_generic(model, tokenizer, caplog):
    inputs = tokenizer(["please write a story"] * 5, return_tensors="pt")
    users = ["ann", "bo", "nobody", None, "somebody"]
    with caplog.at_level(logging.WARNING, "trl_personal"):
        rows = model.generate(**inputs, user_ids=users, max_new_tokens=NEW_TOKENS, do_sample=False).tolist()
    assert rows[0] != rows[1] != rows[2]
    assert rows[2] == rows[3] == rows[4]
    (record,) = caplog.records
    assert record.getMessage().startswith("2 of 5 rows have a user who is not in `model.user_vocab`")
    assert "nobody" not in record.getMessage()
    caplog.clear()
    assert model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False).tolist() == [rows[2]] * 5
    assert not caplog.records


def test_one_id_stands_for_every_row_and_may_be_an_integer(tokenizer):
    model = personalize(make_model())
    model.user_vocab = UserVocab([7, 8, 9])
    inputs = tokenizer(["short", "long"], return_tensors="pt")
    together = model.generate(**inputs, user_ids=8, max_new_tokens=4, do_sample=False)
    assert torch.equal(together, model.generate(**inputs, user_ids=["8", 8], max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("users", [["ann"], ["ann", "bo", "cy"], []])
def test_wrong_number_of_users_is_refused(model, tokenizer, users):
    inputs = tokenizer(["short", "long"], return_tensors="pt")
    with pytest.raises(ValueError, match=f"`user_ids` has {len(users)} users for a batch of 2 rows"):
        model.generate(**inputs, user_ids=users)
    with pytest.raises(ValueError, match="needs `input_ids`"):
        model.generate(user_ids=["ann"])


def test_lengths_count_text_only(model, tokenizer):
    inputs = tokenizer(["please write a"], return_tensors="pt")
    assert model.generate(**inputs, user_ids="ann", max_length=9, do_sample=False).shape == (1, 9)
    assert model.generate(**inputs, user_ids="ann", max_new_tokens=2, do_sample=False).shape == (1, 5)
    config = model.generation_config
    config.max_length = 6
    assert model.generate(**inputs, user_ids="ann", do_sample=False).shape == (1, 6)
    assert config.max_length == 6


def test_default_length_is_that_of_transformers(model, tokenizer):
    inputs = tokenizer(["please write a"], return_tensors="pt")
    assert model.generate(**inputs, user_ids="ann", do_sample=False).shape == (1, 23)


def test_several_sequences_per_prompt(model, batch):
    outputs = model.generate(
        **batch,
        user_ids=USERS,
        num_return_sequences=2,
        num_beams=2,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert torch.equal(outputs.sequences[:, :-4], batch["input_ids"].repeat_interleave(2, dim=0))


def test_sampling_follows_the_seed(model, batch):
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(
            model.generate(**batch, user_ids=USERS, do_sample=True, top_p=0.9, temperature=2.0, max_new_tokens=12)
        )
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_code_of_the_caller_sees_the_callers_ids(model, batch):
    seen = []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids)
            return scores

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(input_ids)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def allowed(row, ids):
        seen.append(ids[None].expand(4, -1) if row == 0 else None)
        return list(range(19))

    length = batch["input_ids"].shape[1]
    model.generate(
        **batch,
        user_ids=USERS,
        max_new_tokens=2,
        do_sample=False,
        logits_processor=LogitsProcessorList([Watch()]),
        stopping_criteria=StoppingCriteriaList([Stop()]),
        prefix_allowed_tokens_fn=allowed,
    )
    ids = [s for s in seen if s is not None]
    assert {s.shape[1] for s in ids} == {length, length + 1, length + 2}
    assert all(torch.equal(s[0, :length], batch["input_ids"][0]) for s in ids)


def test_streamer_gets_the_prompt_and_each_new_token(model, tokenizer, capsys):
    inputs = tokenizer(["please write a story"], return_tensors="pt")
    sequence = model.generate(
        **inputs, user_ids="bo", max_new_tokens=4, do_sample=False, streamer=TextStreamer(tokenizer)
    )
    assert capsys.readouterr().out.split() == tokenizer.decode(sequence[0]).split()


def test_pipeline(model, tokenizer):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    kwargs = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    texts = [out[0]["generated_text"] for out in pipe(["short", "i like dogs"], user_ids="bo", **kwargs)]
    for prompt, text in zip(["short", "i like dogs"], texts, strict=True):
        inputs = tokenizer([prompt], return_tensors="pt")
        expected = model.generate(**inputs, user_ids="bo", max_new_tokens=4, do_sample=False)
        expected_text = tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.split() == expected_text.split()
    with pytest.raises(ValueError, match=r"model.generate\(..., user_ids=\[...\]\)"):
        pipe(["short", "long"], user_ids=["ann", "bo"], **kwargs)
    with pytest.raises(ValueError, match="A pipeline hands prompts over in batches of its own"):
        pipe(["short", "long"] * 4, user_ids=["ann", "bo", "ann", "bo"], batch_size=4, **kwargs)
    assert texts == [out[0]["generated_text"] for out in pipe(["short", "i like dogs"], user_ids=["bo"], **kwargs)]


def test_padding_without_a_mask_is_found_by_its_id(model, batch):
    with_mask = model.generate(**batch, user_ids=USERS, max_new_tokens=4, do_sample=False)
    without = model.generate(batch["input_ids"], user_ids=USERS, max_new_tokens=4, do_sample=False)
    assert torch.equal(with_mask, without)


@pytest.mark.slow
def test_a_new_process_writes_the_same_tokens(tmp_path, batch):
    model = personalize(make_model())
    expected = model.generate(**batch, user_ids=USERS, max_new_tokens=NEW_TOKENS, do_sample=False)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    script = f"""
from transformers import AutoTokenizer
from trl_personal import AutoPersonalizedModelForCausalLM
model = AutoPersonalizedModelForCausalLM.from_pretrained({str(tmp_path)!r})
batch = AutoTokenizer.from_pretrained({str(tmp_path)!r}, padding_side="left")({PROMPTS!r}, padding=True, return_tensors="pt")
print(model.generate(**batch, user_ids={USERS!r}, max_new_tokens={NEW_TOKENS}, do_sample=False).tolist())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip().splitlines()[-1] == str(expected.tolist())


def test_each_users_soft_prompt_is_computed_once(model, batch):
    calls = []
    handle = model.get_base_model() if hasattr(model, "get_base_model") else model
    hook = handle.user_model.register_forward_pre_hook(lambda module, args: calls.append(args[0].tolist()))
    model.generate(**batch, user_ids=["cy", "ann", None, "ann"], max_new_tokens=4, do_sample=False)
    hook.remove()
    assert calls == [[0, 1, 3]]


@pytest.mark.slow
def test_compiled_with_a_static_cache_makes_no_graph_that_the_plain_model_does_not(batch):
    """And none anew for other users."""
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    plain, counts = make_model("llama"), {}
    plain.generation_config.eos_token_id = None
    users = {"plain": [{}], "users": [{"user_ids": USERS}, {"user_ids": USERS[::-1]}]}
    for name, model in (("plain", plain), ("users", personalize(make_model("llama")))):
        expected = [model.generate(**batch, **options, **kwargs) for kwargs in users[name]]
        torch.compiler.reset()
        counter = CompileCounter()
        model.forward = torch.compile(model.forward, backend=counter)
        for sequences, kwargs in zip(expected, users[name], strict=True):
            assert torch.equal(model.generate(**batch, **options, **kwargs), sequences)
        counts[name] = counter.frame_count
    assert counts["users"] == counts["plain"] > 0


def test_auto_class_says_how_it_is_made():
    with pytest.raises(OSError, match="from_pretrained"):
        AutoPersonalizedModelForCausalLM()


# --- One row of ids with BOS ------------------------------------------------------------------------------------------

BOS, EOS = 1, 2
IDS = torch.tensor([[BOS, 5, 6, 7]])


def test_min_length_counts_text_only():
    model = personalize(make_model("gptj"))
    model.generation_config.eos_token_id = EOS
    model.get_output_embeddings().bias.data[EOS] = 1000.0  # stops as soon as it may
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    for min_length, length in ((0, 5), (9, 10)):
        sequence = model.generate(**inputs, user_ids="ann", min_length=min_length, max_length=20, do_sample=False)
        assert sequence.shape == (1, length)
        assert sequence[0, -1] == EOS


def test_eos_in_a_prompt_is_text_where_padding_has_the_same_id():
    model = personalize(make_model("llama"))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = EOS
    ids = torch.tensor([[BOS, 5, EOS, 6, 7]])
    options = {
        "user_ids": "ann",
        "max_new_tokens": 1,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    without = model.generate(ids, **options).scores[0]
    torch.testing.assert_close(without, model.generate(ids, attention_mask=torch.ones_like(ids), **options).scores[0])
    hidden = model.generate(ids, attention_mask=ids.ne(EOS).long(), **options).scores[0]
    assert not torch.allclose(without, hidden)


def test_the_repetition_penalty_leaves_eos_alone_where_it_is_padding_too():
    model = personalize(make_model("llama"))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = EOS
    outputs = model.generate(
        IDS,
        user_ids="ann",
        max_new_tokens=1,
        repetition_penalty=5.0,
        do_sample=False,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    penalized = (outputs.scores[0] != outputs.logits[0]).nonzero()[:, 1].tolist()
    assert penalized == IDS[0].tolist()


def test_token_types_are_those_of_the_prompt_in_generation():
    model = personalize(make_model("gptj"))
    types = torch.tensor([[4, 5, 4, 5]])
    scores = model.generate(
        IDS,
        token_type_ids=types,
        user_ids="ann",
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    ).logits[0]
    torch.testing.assert_close(scores, model(IDS, token_type_ids=types, user_indices=torch.tensor([1])).logits[:, -1])
