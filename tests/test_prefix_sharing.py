"""Chosen and rejected in one packed row are what they are in two; and the other ways to take fewer or smaller passes."""

import logging
import random
from dataclasses import replace
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, make_tokenizer
from families import SIZES, make_family
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl.trainer.utils import add_fused_lm_head

import trl_personal.training.prefix_sharing
from trl_personal import IndividualUserModel, UserModelConfig, UserVocab, attach_user_model
from trl_personal.models.saving import get_base_model
from trl_personal.training.prefix_sharing import (
    MODEL_TYPES,
    PADDING,
    PREFIX,
    REJECTED,
    PackedAttentionMask,
    PackingCost,
    PairPacker,
    PrefixSharing,
    pack_pairs,
    packed_attention_mask,
    reason_not_to_share,
    select_scored,
)


LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
PAIRS = [  # prompt, chosen, rejected
    ([1, 5, 6, 7, 8, 9, 10], [11, 12, 13, 14], [11, 15]),  # longer than a window of 4; the answers start alike
    ([1, 5, 6, 7], [8, 9], [9, 10, 11, 12, 13]),
    ([5, 6], [7], [8]),  # without BOS
]


def collate(pairs, seq_len=None):
    rows = [(prompt, answer) for answers in (1, 2) for prompt, answer in ((pair[0], pair[answers]) for pair in pairs)]
    seq_len = seq_len or max(len(prompt) + len(answer) for prompt, answer in rows)
    padding = [seq_len - len(prompt) - len(answer) for prompt, answer in rows]
    return {
        "input_ids": torch.tensor([p + a + [0] * n for (p, a), n in zip(rows, padding, strict=True)]),
        "attention_mask": torch.tensor([[1] * (seq_len - n) + [0] * n for n in padding]),
        "completion_mask": torch.tensor(
            [[0] * len(p) + [1] * len(a) + [0] * n for (p, a), n in zip(rows, padding, strict=True)]
        ),
    }


def with_users(model):
    torch.manual_seed(1)
    user_model = IndividualUserModel(UserModelConfig(2, 3, model.get_input_embeddings().embedding_dim))
    for parameter in user_model.parameters():
        parameter.data.normal_()
    add_fused_lm_head(model, outputs=FIELDS)
    attach_user_model(model, user_model, UserVocab(["ann", "bo"]), bos_token_id=1)
    PrefixSharing(model)
    return model


def score(model, batch, user_indices, packed):
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    more = {} if packed is None else {"packed_pairs": packed.to_dict()}
    outputs = model(**inputs, **more, user_indices=user_indices, labels=labels, fused_lm_head=True, use_cache=False)
    weights = torch.linspace(0.5, 1.5, outputs.log_probs.numel()).view_as(outputs.log_probs)
    model.zero_grad()
    (outputs.log_probs * weights).sum().backward()
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, batch, user_indices, packed):
    plain, plain_gradients = score(model, batch, user_indices, None)
    shared, shared_gradients = score(model, batch, user_indices, packed)
    for name in FIELDS:
        assert plain[name].shape == shared[name].shape
        torch.testing.assert_close(shared[name].float(), plain[name].float(), rtol=0, atol=1e-5, msg=name)
    assert plain_gradients.keys() == shared_gradients.keys()
    norm = torch.cat([g.flatten() for g in plain_gradients.values()]).norm()
    for name, gradient in plain_gradients.items():
        assert (shared_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * norm, name


USERS = {"reference": None, "users": torch.tensor([1, 2, 0, 1, 2, 0])}


@pytest.mark.parametrize("users", USERS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", sorted(MODEL_TYPES))
def test_packed_rows_score_the_same(family, attention, users):
    model = make_family(family)
    if model.config._attn_implementation != attention:
        if not (model._supports_sdpa and model._can_set_attn_implementation()):
            pytest.skip(f"{family} has no choice of attention")
        model.set_attn_implementation(attention)
    assert reason_not_to_share(model.config) is None
    batch = collate(PAIRS, seq_len=13)
    assert_same(with_users(model), batch, USERS[users], pack_pairs(**batch))


@pytest.mark.parametrize(
    "pairs",
    [[([5, 6], [], [])], [([5], [6], [6])], [([1], [7], [7]), ([5], [6], [6])]],
    ids=["no answers", "equal answers", "two pairs"],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "falcon"])
def test_a_packed_row_may_have_one_column(family, attention, pairs):
    """transformers puts the heads of a group into the columns of the query if there is only one."""
    model = make_family(family)
    model.set_attn_implementation(attention)
    batch = collate(pairs)
    packed = pack_pairs(**batch)
    assert packed.tokens.shape == (len(pairs), 1)
    model = with_users(model)
    for users in (None, torch.arange(len(pairs)).repeat(2)):
        assert_same(model, batch, users, packed)


@pytest.mark.parametrize("num_virtual_tokens", [3, 5])
def test_soft_prompts_in_the_call_are_packed_as_users_are(num_virtual_tokens):
    model = with_users(make_model("llama"))
    batch = collate(PAIRS, seq_len=13)
    labels = batch.pop("completion_mask").eq(0)
    labels = batch["input_ids"].masked_fill(labels, -100)
    torch.manual_seed(2)
    soft_prompts = torch.randn(len(PAIRS), num_virtual_tokens, 32).repeat(2, 1, 1)
    call = {**batch, "soft_prompts": soft_prompts, "labels": labels, "fused_lm_head": True, "use_cache": False}
    packed = pack_pairs(**collate(PAIRS, seq_len=13)).to_dict()
    torch.testing.assert_close(
        model(**call, packed_pairs=packed).log_probs, model(**call).log_probs, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("seed", range(20))
def test_any_batch(seed):
    draw = random.Random(seed)

    def tokens(low, high):
        return [
            draw.randrange(3, 6) for _ in range(draw.randint(low, high))
        ]  # few words: the answers often start alike

    pairs = [([1] * draw.randint(0, 1) + tokens(2, 6), tokens(1, 5), tokens(1, 5)) for _ in range(draw.randint(1, 4))]
    batch = collate(pairs)
    model = with_users(make_model("llama"))
    users = torch.tensor([draw.randrange(3) for _ in pairs]).repeat(2)
    assert_same(model, batch, users, pack_pairs(**batch))
    assert_same(model, batch, users, select_scored(batch["completion_mask"]))


def test_what_cannot_be_packed():
    batch = collate(PAIRS)
    flipped = {name: values.flip(1) for name, values in batch.items()}  # padding on the left
    assert pack_pairs(**flipped) is None
    assert pack_pairs(**collate([([], [5, 6], [5, 7])])) is None  # a soft prompt after BOS would not be in the prefix
    assert PairPacker()(batch | {"pixel_values": torch.zeros(1)}) is None
    assert PairPacker()(collate([([1], [5], [6])])) is None


def test_windows_are_of_positions_not_of_columns():
    branches, positions = torch.tensor([[1, 1, 1, 2, 2, 3, 3]]), torch.tensor([[0, 1, 2, 3, 4, 3, 4]])
    mask = packed_attention_mask(branches, positions, window=3)[0, 0].long()
    assert mask[6].tolist() == [0, 0, 1, 0, 0, 1, 1]
    assert mask[5].tolist() == [0, 1, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("num_virtual_tokens", [0, 2])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_attention_in_blocks_is_that_of_the_whole_mask(seed, window, num_virtual_tokens):
    """Lengths of all kinds in a batch; few rejected columns (a mask of theirs) and many (a causal block)."""
    random.seed(seed)
    numbers = [iter(range(3, 10**6)), iter(range(10**6, 2 * 10**6))]
    most = 3 if seed % 2 else 9
    pairs = [
        (list(islice(numbers[0], random.randint(2, 6))), *(list(islice(n, random.randint(1, most))) for n in numbers))
        for _ in range(4)
    ]
    batch = collate(pairs)
    packed = pack_pairs(**batch)
    branches = F.pad(packed.branches, (num_virtual_tokens, 0), value=PREFIX)
    position_ids = F.pad(packed.position_ids + num_virtual_tokens, (num_virtual_tokens, 0))
    position_ids[:, :num_virtual_tokens] = torch.arange(num_virtual_tokens)
    plain = packed_attention_mask(branches, position_ids, window)
    num_rejected = packed.rejected.shape[1]
    assert packed.rejected.sum(1).tolist() == packed.branches.eq(REJECTED).sum(1).tolist()
    row_length = batch["input_ids"].shape[1] - 1 + num_virtual_tokens
    mask = PackedAttentionMask.make(branches, position_ids, num_rejected, row_length, window)
    assert mask.shape == plain.shape
    with torch._C.DisableTorchFunctionSubclass():
        assert mask.untyped_storage().nbytes() == 1  # no W x W values
    assert torch.equal(mask[:, :, :, :], plain)
    assert mask.queries.shape[1] == (row_length if 2 * num_rejected > row_length else num_rejected)
    torch.manual_seed(seed)
    inputs = [torch.randn(4, heads, branches.shape[1], 8, requires_grad=True) for heads in (4, 2, 2)]
    is_token = branches.ne(PADDING)[:, None, :, None]
    outputs, gradients = [], []
    for kind in (plain, mask):
        output = F.scaled_dot_product_attention(*inputs, kind, scale=0.5, enable_gqa=True) * is_token
        outputs.append(output)
        gradients.append(torch.autograd.grad((output * output.detach().cos()).sum(), inputs))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


def test_sdpa_computes_in_blocks(make_trainer, monkeypatch):
    """Should transformers hand on another mask, results would be right and slow."""
    attend, calls = trl_personal.training.prefix_sharing._attend, []
    monkeypatch.setattr(
        trl_personal.training.prefix_sharing,
        "_attend",
        lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs),
    )
    trainer = make_trainer("llama", share_prefix="always", max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    num_layers = trainer.model.config.num_hidden_layers
    assert len(calls) == 4 * num_layers  # the check, the reference, the user's term and the generic user's


def test_long_prompts_are_packed_and_long_answers_are_not():
    cost = PackingCost(num_parameters=22_000_000, attention_width=7 * 512, num_virtual_tokens=10)
    packer = PairPacker(cost)
    numbers = iter(range(3, 10**6))

    def pair(prompt, answer):
        return [next(numbers) for _ in range(prompt)], *([next(numbers) for _ in range(answer)] for _ in range(2))

    assert packer(collate([pair(400, 40)])) is not None
    assert packer(collate([pair(60, 600)])) is None
    assert cost.separate(100) == 2 * 110 * (2 * 22_000_000 + 4 * 3.0 * 7 * 512 * 110)
    assert cost.packed(100, 130, 30) == 140 * (2 * 22_000_000 + 4 * 3.0 * 7 * 512 * 140)
    blocks = replace(cost, has_blocks=True)
    assert blocks.separate(100) == 2 * 110 * 2 * 22_000_000 + 110**2 * 4 * 3.0 * 7 * 512
    assert blocks.packed(100, 130, 30) == 140 * 2 * 22_000_000 + (109**2 / 2 + 30 * 109) * 4 * 3.0 * 7 * 512
    assert blocks.packed(100, 170, 80) == 180 * 2 * 22_000_000 + (109**2 / 2 + 109**2 / 2) * 4 * 3.0 * 7 * 512
    assert PairPacker(blocks)(collate([pair(60, 600)])) is not None  # no longer in vain
    assert PairPacker(blocks)(collate([pair(10, 600)])) is None
    assert set(PairPacker(cost, selects=True)(collate([pair(60, 600)]))) == {"scored_columns", "labels", "scores"}


@pytest.mark.parametrize("family", sorted(set(SIZES) - MODEL_TYPES))
def test_other_families_train_unpacked_and_say_so_once(family, make_trainer, tmp_path, caplog):
    make_family(family).save_pretrained(tmp_path / "model")
    make_tokenizer(family=family).save_pretrained(tmp_path / "model")
    model = {"model": str(tmp_path / "model")}
    with caplog.at_level(logging.WARNING, "trl_personal.training.dpo"):
        trainer = make_trainer(trainer_kwargs=model, precompute_ref_log_probs=True)
        trainer.train()
    assert sum("do not share the tokens of their prompt" in message for message in caplog.messages) == 1
    assert "packed_pairs" not in next(iter(trainer.get_train_dataloader()))
    with pytest.raises(ValueError, match='`share_prefix="always"` is not possible'):
        make_trainer(trainer_kwargs=model, share_prefix="always")


def history(trainer):
    trainer.train()
    times = ("runtime", "per_second", "total_flos")
    logs = [
        {name: value for name, value in log.items() if not any(t in name for t in times)}
        for log in trainer.state.log_history
    ]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return logs, weights


def assert_same_history(one, other, tolerance=2e-5):
    for log, expected in zip(one[0], other[0], strict=True):
        assert log == pytest.approx(expected, abs=tolerance, rel=tolerance)
    for name, weight in one[1].items():
        torch.testing.assert_close(weight, other[1][name], rtol=1e-4, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    "settings", [{}, {"precompute_ref_log_probs": True}, {"gradient_checkpointing": True}], ids=str
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_is_the_same(lora, settings, make_trainer, preferences):
    settings = {
        "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "optim": "sgd", "learning_rate": 0.1,
        "trainer_kwargs": {"eval_dataset": preferences, **({"peft_config": LORA} if lora else {})},
    } | settings  # fmt: skip
    never = make_trainer("llama", **settings, share_prefix="never")
    always = make_trainer("llama", **settings, share_prefix="always")
    assert "packed_pairs" not in next(iter(never.get_train_dataloader()))
    assert "tokens" in next(iter(always.get_train_dataloader()))["packed_pairs"]
    assert_same_history(history(always), history(never))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_decoder_gets_one_row_for_a_pair(lora, make_trainer):
    """Should TRL no longer hand the packed pairs on, or call another module, results would be right and slow."""
    trainer = make_trainer("llama", lora=lora, share_prefix="always", max_steps=1)
    trainer.current_gradient_accumulation_steps = 1
    shapes = []
    get_base_model(trainer.model).get_decoder().layers[0].register_forward_pre_hook(
        lambda layer, args: shapes.append(args[0].shape[:2]) if torch.is_grad_enabled() else None
    )
    batch = next(iter(trainer.get_train_dataloader()))
    width = batch["packed_pairs"]["tokens"].shape[1]
    trainer.training_step(trainer.model, batch)
    assert shapes == [(4, width + 3)] * 2  # four pairs, three virtual tokens; the user's term and the generic user's


def test_packing_is_checked_on_the_first_batch_that_can_be_packed(make_trainer):
    trainer = make_trainer("llama", share_prefix="always")
    batch = next(iter(trainer.get_train_dataloader()))
    odd = {name: value for name, value in batch.items() if name != "packed_pairs"}
    odd["input_ids"] = odd["input_ids"].clone()
    odd["input_ids"][0, 0] = 5  # a pair that starts with different tokens
    checked = []
    for inputs in (odd, batch):
        trainer.compute_loss(trainer.model, inputs)
        checked.append(trainer.shared_prompts.is_checked)
    assert checked == [False, True]


def test_the_check_draws_nothing_at_random(make_trainer, tmp_path, caplog):
    """OPT drops out in functions, which `disable_dropout` does not reach: a resumed run must draw as the straight one."""
    make_family("opt").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    trainer = make_trainer(share_prefix="always", trainer_kwargs={"model": str(tmp_path / "model")})
    assert trainer.model.config.dropout == 0.1
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, "trl_personal.training.dpo"):
        trainer.shared_prompts.check(trainer.model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.shared_prompts.packer is not None
    assert caplog.messages == []
    assert all(module.training for module in trainer.model.modules())


def test_quantized_models_share_too(make_trainer, tmp_path):
    make_family("llama", wide=True).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    kwargs = {
        "model": str(tmp_path / "model"),
        "peft_config": LORA,
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    }
    settings = {"max_steps": 1, "optim": "sgd"}
    shared = history(make_trainer(trainer_kwargs=kwargs, share_prefix="always", **settings))
    plain = history(make_trainer(trainer_kwargs=kwargs, share_prefix="never", **settings))
    # bitsandbytes rounds differently for other numbers of rows
    assert shared[0][0]["loss"] == pytest.approx(plain[0][0]["loss"], abs=5e-3)
    assert shared[0][0]["logps/chosen"] == pytest.approx(plain[0][0]["logps/chosen"], rel=5e-3)


def test_a_model_that_computes_something_else_is_found_out(make_trainer, monkeypatch, caplog):
    eager = {"model_init_kwargs": {"attn_implementation": "eager"}}
    plain = history(make_trainer("llama", share_prefix="never", **eager))
    wrong = packed_attention_mask

    def everything(branches, position_ids, window=None):
        return wrong(branches.clamp(max=1), position_ids)  # rejected sees chosen

    monkeypatch.setattr(trl_personal.training.prefix_sharing, "packed_attention_mask", everything)
    trainer = make_trainer("llama", share_prefix="always", **eager)
    with caplog.at_level(logging.WARNING, "trl_personal.training.dpo"):
        found = history(trainer)
    assert sum("differ in log-probability" in message for message in caplog.messages) == 1
    assert_same_history(found, plain, tolerance=0)


# --- Passes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_backward_passes_are_one(accumulation, make_trainer, monkeypatch):
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    settings |= {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3}
    two = history(make_trainer("llama", **settings))
    monkeypatch.setattr("trl_personal.PersonalizedDPOTrainer._may_take_several_backward_passes", lambda self: False)
    assert_same_history(two, history(make_trainer("llama", **settings)), tolerance=1e-5)


def test_one_graph_at_a_time(make_trainer, monkeypatch):
    """When the second policy pass starts, the first one's gradient is there already."""
    trainer = make_trainer("llama")
    trainer.current_gradient_accumulation_steps = 1
    gradients = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            gradients.append(module.user_model.generic_prompt.grad is not None)
            if kwargs.get("user_indices") is not None and torch.is_grad_enabled()
            else None
        ),
        with_kwargs=True,
        prepend=True,
    )
    trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert gradients == [False, True]


def test_sampled_users_are_an_even_share(make_trainer):
    trainer = make_trainer(generic_term="sampled", personalization_alpha=0.3)
    users = torch.arange(1, 11).repeat(2)
    counts = torch.zeros(11)
    for _ in range(400):
        kept = trainer._sampled_users(users)
        assert torch.equal(*kept.chunk(2))
        assert (kept.chunk(2)[0] > 0).sum() == 3
        counts += torch.bincount(kept.chunk(2)[0], minlength=11)
    assert ((counts[1:] / 400 - 0.3).abs() < 0.1).all()


def test_sampled_loss_is_one_term_for_each_pair(make_trainer, monkeypatch):
    trainer = make_trainer("llama", generic_term="sampled", per_device_train_batch_size=4)
    batch = next(iter(trainer.get_train_dataloader()))
    kept = torch.tensor([1, 0, 1, 0] * 2).bool()
    monkeypatch.setattr(trainer, "_sampled_users", lambda users: users * kept)
    trainer.model.train()
    sampled = trainer.compute_loss(trainer.model, batch)
    terms = []
    for row in range(4):
        one = trainer.data_collator([trainer.train_dataset[int(i)] for i in find_rows(trainer, batch, row)])
        users = one["user_indices"] * kept[row]
        monkeypatch.setattr(trainer, "_sampled_users", lambda _, users=users: users)
        terms.append(trainer.compute_loss(trainer.model, one))
    assert sampled.item() == pytest.approx(torch.stack(terms).mean().item(), abs=1e-6)


def find_rows(trainer, batch, row):
    """Where the pair of a batch is in the dataset."""
    for i, example in enumerate(trainer.train_dataset):
        chosen = example["prompt_ids"] + example["chosen_ids"]
        rejected = example["prompt_ids"] + example["rejected_ids"]
        if (
            batch["input_ids"][row, : len(chosen)].tolist() == chosen
            and batch["input_ids"][row + 4, : len(rejected)].tolist() == rejected
            and batch["attention_mask"][row].sum() == len(chosen)
        ):
            return [i]
    raise AssertionError("no such row")


def test_sampled_runs_train_and_evaluate_both_terms(make_trainer, preferences):
    trainer = make_trainer(generic_term="sampled", trainer_kwargs={"eval_dataset": preferences})
    trainer.train()
    assert not any("generic/" in name for log in trainer.state.log_history for name in log)
    assert "eval_generic/rewards/accuracies" in trainer.evaluate()


@pytest.mark.parametrize("name", ["generic_term", "share_prefix"])
def test_other_settings_are_refused(name, make_args):
    with pytest.raises(ValueError, match=f"`{name}` must be one of"):
        make_args(**{name: "sometimes"})


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_model_gets_the_plain_mask(make_trainer, compiled):
    """Hooks run outside of what is compiled, whose guards look at a mask's strides."""
    settings = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
    trainer = make_trainer("llama", share_prefix="always", **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    masks = []

    def keep_mask(decoder, args, kwargs):
        masks.append(type(kwargs["attention_mask"]))

    trainer.model.get_decoder().register_forward_pre_hook(keep_mask, with_kwargs=True)
    with torch.no_grad():
        trainer.compute_loss(trainer.model, batch)
    assert (PackedAttentionMask in masks) is not compiled
