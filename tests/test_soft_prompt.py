"""Conditioning equals embeddings concatenated by hand, and outputs stay aligned with the caller's ids."""

import copy

import pytest
import torch
from conftest import CONFIGS, make_model
from families import make_family
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from trl_personal import (
    IndividualUserModel,
    UserModelConfig,
    UserVocab,
    attach_user_model,
    detach_user_model,
)
from trl_personal.models.soft_prompt import insert_position_ids, source_columns


NUM_VIRTUAL_TOKENS = 3
BOS = 1


def make_user_model(token_dim=32, seed=5):
    torch.manual_seed(seed)
    user_model = IndividualUserModel(UserModelConfig(2, NUM_VIRTUAL_TOKENS, token_dim))
    user_model.user_offsets.weight.data[1:].normal_()
    user_model.generic_prompt.data.normal_()
    return user_model


def personalize(model, **kwargs):
    attach_user_model(model, make_user_model(), UserVocab(["ann", "bo"]), **kwargs)
    return model


@pytest.fixture(params=sorted(CONFIGS))
def model(request):
    return make_model(request.param)


@pytest.fixture
def personalized(model):
    return personalize(copy.deepcopy(model))


# rows with and without BOS, padded right, left, and not at all
BATCH = {
    "input_ids": torch.tensor(
        [[BOS, 5, 6, 7, 0], [0, 0, BOS, 8, 9], [5, 6, 7, 8, 9], [0, 6, 7, 3, 4], [BOS, 5, BOS, 6, 0]]
    ),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1] * 5, [0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
}
USERS = torch.tensor([1, 2, 0, 2, 1])


def logits_by_hand(model, user_model, ids, user):
    """One row without padding: logits at the positions that predict `ids[1:]`, then the next token."""
    embeds = model.get_input_embeddings()(ids)
    soft_prompt = user_model.generic_prompt + user_model.user_offsets.weight[user].view(NUM_VIRTUAL_TOKENS, -1)
    position = 1 if ids[0] == BOS else 0
    embeds = torch.cat([embeds[:position], soft_prompt, embeds[position:]])
    logits = model(inputs_embeds=embeds[None]).logits[0]
    keep = [t if t + 1 < position else t + NUM_VIRTUAL_TOKENS for t in range(len(ids))]
    return logits[keep]


@pytest.mark.parametrize("side", ["right", "none"])
def test_equals_embeddings_concatenated_by_hand(model, personalized, side):
    rows = [0, 4] if side == "right" else [2]  # left padding moves positions: see the test with position ids
    batch = {name: values[rows] for name, values in BATCH.items()}
    logits = personalized(**batch, user_indices=USERS[rows]).logits
    assert logits.shape[:2] == batch["input_ids"].shape
    for row, original in enumerate(rows):
        mask = batch["attention_mask"][row].bool()
        expected = logits_by_hand(model, personalized.user_model, batch["input_ids"][row][mask], USERS[original])
        torch.testing.assert_close(logits[row][mask], expected, rtol=1e-5, atol=1e-5)


def test_left_padded_rows_with_position_ids_equal_the_rows_alone(model, personalized):
    position_ids = (BATCH["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = personalized(**BATCH, position_ids=position_ids, user_indices=USERS).logits
    for row in range(len(USERS)):
        mask = BATCH["attention_mask"][row].bool()
        expected = logits_by_hand(model, personalized.user_model, BATCH["input_ids"][row][mask], USERS[row])
        torch.testing.assert_close(logits[row][mask], expected, rtol=1e-5, atol=1e-5)


def test_without_users_it_is_the_plain_model_bit_for_bit(model, personalized):
    assert torch.equal(personalized(**BATCH).logits, model(**BATCH).logits)
    assert torch.equal(personalized(**BATCH, user_indices=None).logits, model(**BATCH).logits)


def test_a_call_without_users_after_one_with_users_is_plain_again(model, personalized):
    personalized(**BATCH, user_indices=USERS)
    assert torch.equal(personalized(**BATCH).logits, model(**BATCH).logits)


def test_a_failed_call_leaves_nothing_behind(model, personalized):
    with pytest.raises(ValueError, match="one user per row"):
        personalized(**BATCH, user_indices=USERS[:2])
    assert torch.equal(personalized(**BATCH).logits, model(**BATCH).logits)


def test_labels_need_no_shift(model, personalized):
    labels = BATCH["input_ids"].masked_fill(BATCH["attention_mask"] == 0, -100)
    outputs = personalized(**BATCH, labels=labels, user_indices=USERS)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)


def test_hidden_states_and_attentions_show_no_virtual_token(personalized):
    personalized.set_attn_implementation("eager")
    outputs = personalized(**BATCH, user_indices=USERS, output_hidden_states=True, output_attentions=True)
    assert {layer.shape for layer in outputs.hidden_states} == {(5, 5, 32)}
    assert {layer.shape for layer in outputs.attentions} == {(5, 4, 5, 5)}
    assert torch.equal(personalized.get_output_embeddings()(outputs.hidden_states[-1]), outputs.logits)


def test_gradients_reach_only_the_users_in_the_batch(personalized):
    personalized(**BATCH, user_indices=torch.tensor([2, 2, 0, 0, 2])).logits.square().sum().backward()
    gradient = personalized.user_model.user_offsets.weight.grad
    assert gradient[2].abs().sum() > 0
    assert gradient[[0, 1]].abs().sum() == 0


def test_soft_prompt_is_cast_to_the_embeddings_and_stays_float32(model):
    model = copy.deepcopy(model).to(torch.bfloat16)
    attach_user_model(model, make_user_model(), UserVocab(["ann", "bo"]))
    assert model(**BATCH, user_indices=USERS).logits.dtype == torch.bfloat16
    assert {p.dtype for p in model.user_model.parameters()} == {torch.float32}


def test_peft_model_is_conditioned_too(model):
    expected = copy.deepcopy(model)
    attach_user_model(expected, make_user_model(), UserVocab(["ann", "bo"]))
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    attach_user_model(peft_model, make_user_model(), UserVocab(["ann", "bo"]))
    torch.testing.assert_close(
        peft_model(**BATCH, user_indices=USERS).logits, expected(**BATCH, user_indices=USERS).logits
    )
    merged = peft_model.merge_and_unload()
    assert torch.equal(merged(**BATCH, user_indices=USERS).logits, expected(**BATCH, user_indices=USERS).logits)


def test_a_copy_has_a_user_model_of_its_own(personalized):
    copied = copy.deepcopy(personalized)
    before = personalized(**BATCH, user_indices=USERS).logits
    assert torch.equal(copied(**BATCH, user_indices=USERS).logits, before)
    copied.user_model.generic_prompt.data.zero_()
    assert torch.equal(personalized(**BATCH, user_indices=USERS).logits, before)
    assert not torch.equal(copied(**BATCH, user_indices=USERS).logits, before)


def test_the_object_keeps_its_type_and_detaching_undoes_everything(model):
    names, cls = set(model.state_dict()), type(model)
    user_model, vocab = make_user_model(), UserVocab(["ann", "bo"])
    attach_user_model(model, user_model, vocab)
    assert isinstance(model, cls)
    assert type(model).__name__ == cls.__name__
    assert set(model.state_dict()) > names
    assert detach_user_model(model) == (user_model, vocab)
    assert type(model) is cls
    assert set(model.state_dict()) == names
    with pytest.raises(ValueError, match="no user model attached"):
        detach_user_model(model)


# --- Soft prompts in the call -----------------------------------------------------------------------------------------


def gradients_of(model, **conditions):
    model.zero_grad()
    logits = model(**BATCH, **conditions).logits
    logits.square().sum().backward()
    return logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_users_are_their_soft_prompts(model, lora):
    if lora:
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
        model = get_peft_model(model, config).eval()
    attach_user_model(model, make_user_model(), UserVocab(["ann", "bo"]))
    user_model = next(module for module in model.modules() if isinstance(module, IndividualUserModel))
    logits, gradients = gradients_of(model, user_indices=USERS)
    given_logits, given_gradients = gradients_of(model, soft_prompts=user_model(USERS))
    assert torch.equal(logits, given_logits)
    assert gradients.keys() == given_gradients.keys()
    assert any("user_offsets" in name for name in gradients)
    assert all(torch.equal(gradients[name], given_gradients[name]) for name in gradients)


@pytest.mark.parametrize("num_virtual_tokens", [1, 5])
def test_soft_prompts_may_have_another_length_than_the_user_model_makes(model, personalized, num_virtual_tokens):
    torch.manual_seed(1)
    soft_prompts = torch.randn(1, num_virtual_tokens, 32)
    ids = torch.tensor([[BOS, 5, 6, 7]])
    embeds = model.get_input_embeddings()(ids)
    embeds = torch.cat([embeds[:, :1], soft_prompts, embeds[:, 1:]], dim=1)
    expected = model(inputs_embeds=embeds).logits[:, num_virtual_tokens:]  # BOS: that of the last virtual token
    torch.testing.assert_close(personalized(ids, soft_prompts=soft_prompts).logits, expected, rtol=1e-5, atol=1e-5)


def test_soft_prompts_of_none_are_the_plain_model(model, personalized):
    assert torch.equal(personalized(**BATCH, soft_prompts=None).logits, model(**BATCH).logits)


def test_soft_prompts_that_do_not_fit_are_refused(model, personalized):
    right = personalized.user_model(USERS)
    with pytest.raises(ValueError, match="`user_indices` or `soft_prompts`, not both"):
        personalized(**BATCH, user_indices=USERS, soft_prompts=right)
    for wrong in (right[:2], right[0], right[:, :, :16], right[:, :0], right[None]):
        shape = str(tuple(wrong.shape)).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(ValueError, match=rf"one prompt per row.*\(5, 1 or more, 32\), got {shape}.*user_model"):
            personalized(**BATCH, soft_prompts=wrong)
    with pytest.raises(TypeError, match="floating-point numbers, got torch.int64"):
        personalized(**BATCH, soft_prompts=right.long())
    with pytest.raises(TypeError, match="floating-point numbers, got list"):
        personalized(**BATCH, soft_prompts=right.tolist())
    assert torch.equal(personalized(**BATCH).logits, model(**BATCH).logits)


def test_position_ids_count_on_through_the_soft_prompt():
    positions = torch.tensor([0, 1, 2])
    position_ids = torch.arange(2).expand(3, 2)
    inserted = insert_position_ids(position_ids, positions, *source_columns(positions, 2, 3))
    assert torch.equal(inserted, torch.arange(5).expand(3, 5))


def test_attaching_twice_or_what_does_not_fit_is_refused(personalized, model):
    with pytest.raises(ValueError, match="has a user model already"):
        attach_user_model(personalized, make_user_model(), UserVocab(["ann", "bo"]))
    with pytest.raises(ValueError, match="soft prompts of width 16.*width 32.*token_dim=32"):
        attach_user_model(model, make_user_model(token_dim=16), UserVocab(["ann", "bo"]))
    with pytest.raises(ValueError, match="rows for 2 users, the vocabulary has 1"):
        attach_user_model(model, make_user_model(), UserVocab(["ann"]))
    with pytest.raises(ValueError, match="Linear is not a decoder-only transformers model"):
        attach_user_model(torch.nn.Linear(2, 2), make_user_model(), UserVocab(["ann", "bo"]))


# --- Outputs of a conditioned call ------------------------------------------------------------------------------------

IDS = torch.tensor([[BOS, 5, 6, 7]])
ANN = torch.tensor([1])
REAL = [0, 4, 5, 6]  # columns of `IDS` with the soft prompt of three after BOS
PREDICTING = [3, 4, 5, 6]  # BOS is represented by the last virtual token


def embeddings_by_hand(model, user=1):
    """`IDS` with the soft prompt in, `(1, 7, 32)`, for a call without users."""
    embeds = model.get_input_embeddings()(IDS[0])
    offset = model.user_model.user_offsets.weight[user].view(NUM_VIRTUAL_TOKENS, -1)
    return torch.cat([embeds[:1], model.user_model.generic_prompt + offset, embeds[1:]])[None]


def test_attentions_are_from_predicting_columns_to_real_tokens():
    model = personalize(make_model("llama"))
    model.set_attn_implementation("eager")
    by_hand = model(inputs_embeds=embeddings_by_hand(model), output_attentions=True).attentions
    found = model(IDS, user_indices=ANN, output_attentions=True).attentions
    assert len(found) == 2
    for layer, expected in zip(found, by_hand, strict=True):
        torch.testing.assert_close(layer, expected[:, :, PREDICTING][:, :, :, REAL])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_router_logits_are_those_of_the_real_tokens(family):
    model = personalize(make_family(family))
    by_hand = model(inputs_embeds=embeddings_by_hand(model), output_router_logits=True).router_logits
    found = model(IDS, user_indices=ANN, output_router_logits=True).router_logits
    for layer, expected in zip(found, by_hand, strict=True):
        torch.testing.assert_close(layer, expected[REAL])


def test_virtual_tokens_have_token_type_zero():
    model = personalize(make_model("gptj"))  # adds the embedding of the token type
    types = torch.tensor([[4, 5, 4, 5]])
    by_hand = model(
        inputs_embeds=embeddings_by_hand(model), token_type_ids=torch.tensor([[4, 0, 0, 0, 5, 4, 5]])
    ).logits
    found = model(IDS, token_type_ids=types, user_indices=ANN).logits
    torch.testing.assert_close(found, by_hand[:, PREDICTING])


# --- Calls that fail, hooks -------------------------------------------------------------------------------------------


def out_of_memory(*args, **kwargs):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("where", ["language model", "layer"])
def test_the_call_after_a_failed_one_is_plain(monkeypatch, where):
    model = personalize(make_model("llama"))
    expected = model(IDS).logits
    module = model if where == "language model" else model.get_decoder().layers[-1]
    with monkeypatch.context() as patch:
        patch.setattr(module, "forward", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(IDS, user_indices=ANN)
    assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model(IDS, use_cache=False).logits, expected)


def test_a_model_that_does_not_call_its_decoder_is_named(monkeypatch):
    model = personalize(make_model("llama"))
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: torch.zeros(1))
    assert torch.equal(model(IDS), torch.zeros(1))
    with pytest.raises(RuntimeError, match="LlamaForCausalLM does not call its decoder as a module"):
        model(IDS, user_indices=ANN)


def test_no_hook_stays_after_detaching():
    model = personalize(make_model("llama"))
    user_model, vocab = detach_user_model(model)
    attach_user_model(
        model, user_model, vocab, bos_token_id=7
    )  # rows that start with 1 have the soft prompt first now
    found = model(IDS, user_indices=ANN).logits
    torch.testing.assert_close(
        found, personalize(make_model("llama"), bos_token_id=7)(IDS, user_indices=ANN).logits, rtol=0, atol=0
    )
    assert not torch.allclose(found, personalize(make_model("llama"))(IDS, user_indices=ANN).logits)


def test_calls_that_cannot_be_conditioned_are_refused():
    model = personalize(make_model("llama"))
    with pytest.raises(ValueError, match=r"one user per row, shape \(1,\), got \(2,\)"):
        model(IDS, user_indices=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"`attention_mask` of the shape of `input_ids`, \(1, 4\)"):
        model(IDS, attention_mask=torch.ones(1, 1, 4, 4), user_indices=ANN)
    cache = DynamicCache(config=model.config)
    model(IDS, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="cannot continue from a cache"):
        model(IDS, past_key_values=cache, user_indices=ANN)
    with pytest.raises(ValueError, match="needs `input_ids`"):
        model(inputs_embeds=embeddings_by_hand(model), user_indices=ANN)
