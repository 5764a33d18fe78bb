"""
What `trl.DPOTrainer` does, ours does: every mode, once without users (TRL's numbers, to the last bit) and once with users,
against formulas of the papers on log-probabilities computed by hand.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, make_tokenizer
from datasets import Dataset, DatasetDict, IterableDatasetDict
from families import SIZES, make_family
from peft import LoraConfig, get_peft_model
from test_loss import batch_of, disturb, soft_prompt_by_hand
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_personal import PersonalizedDPOTrainer
from trl_personal.models.saving import get_base_model


BETA = 0.3
TIMING = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}


def history(trainer):
    return [{name: value for name, value in log.items() if name not in TIMING} for log in trainer.state.log_history]


# --- Losses -----------------------------------------------------------------------------------------------------------


def token_log_probs(causal_lm, example, name, soft_prompt=None):
    """Log-probabilities `(n,)` of a completion's tokens, and the log of the sum of squared probabilities at each."""
    ids = torch.tensor(example["prompt_ids"] + example[name])
    embeds = causal_lm.get_input_embeddings()(ids)
    if soft_prompt is not None:
        position = int(ids[0] == 1)
        embeds = torch.cat([embeds[:position], soft_prompt, embeds[position:]])
    n = len(example[name])
    log_probs = causal_lm(inputs_embeds=embeds[None], use_cache=False).logits[0].log_softmax(-1)[-n - 1 : -1]
    return log_probs.gather(1, torch.tensor(example[name])[:, None]).squeeze(1), (2 * log_probs).logsumexp(-1)


def by_hand(trainer, example, user):
    """(chosen, rejected) tokens' log-probabilities under policy and reference, and the WPO weight of the pair."""
    causal_lm = get_base_model(trainer.model)
    soft_prompt = soft_prompt_by_hand(trainer.user_model, user)
    policy, weight = [], 1.0
    for name in ("chosen_ids", "rejected_ids"):
        tokens, log_sum_sq = token_log_probs(causal_lm, example, name, soft_prompt)
        policy.append(tokens)
        weight = weight * (tokens - log_sum_sq).mean().exp().detach()
    with torch.no_grad():
        reference = [token_log_probs(trainer.ref_model, example, name)[0] for name in ("chosen_ids", "rejected_ids")]
    return policy, reference, weight


def divergence(t, kind, a=0.5):
    """f'(exp t) of f-DPO, up to constants that cancel; `t` is a log-ratio."""
    if kind == "forward_kl":
        return 1 - torch.exp(-t)
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(t)
    if kind == "alpha_divergence":
        return (torch.exp((a - 1) * t) - 1) / (a - 1)
    return t


def pair_loss(loss_type, policy, reference, s=0.0, kind="reverse_kl", ld_alpha=None):
    """One pair's loss, from the formulas of the papers; `aot` losses with one pair sort nothing."""
    weight = [torch.ones(len(tokens)) for tokens in policy]
    if ld_alpha is not None:
        shared = min(len(tokens) for tokens in policy)
        weight = [torch.where(torch.arange(len(w)) < shared, w, ld_alpha * w) for w in weight]
    w, lo = ((p * v).sum() for p, v in zip(policy, weight, strict=True))  # winner and loser
    rw, rl = ((p * v).sum() for p, v in zip(reference, weight, strict=True))
    cw, cl = divergence(w - rw, kind), divergence(lo - rl, kind)
    x = BETA * (cw - cl)
    nw, nl = len(policy[0]), len(policy[1])
    log, sig = F.logsigmoid, torch.sigmoid
    match loss_type:
        case "sigmoid":
            return -log(x)
        case "hinge":
            return torch.relu(1 - x)
        case "ipo":
            return (cw / nw - cl / nl - 1 / (2 * BETA)) ** 2
        case "exo_pair":
            return sig(x) * (log(x) - math.log(1 - s)) + sig(-x) * (log(-x) - math.log(s))
        case "nca_pair":
            return -log(BETA * (w - rw)) - 0.5 * log(-BETA * (w - rw)) - 0.5 * log(-BETA * (lo - rl))
        case "robust":
            return (-(1 - s) * log(x) + s * log(-x)) / (1 - 2 * s)
        case "bco_pair":
            return -log(BETA * (w - rw)) - log(-BETA * (lo - rl))
        case "sppo_hard":
            return (w - rw - 0.5 / BETA) ** 2 + (lo - rl + 0.5 / BETA) ** 2
        case "aot" | "aot_unpaired":
            return -log(x) * (1 - s) - log(-x) * s
        case "apo_zero":
            return 1 - sig(BETA * (w - rw)) + sig(BETA * (lo - rl))
        case "apo_down":
            return sig(BETA * (w - rw)) + 1 - sig(x)
        case "discopop":
            m = sig(x / 0.05)
            return -log(x) * (1 - m) + torch.exp(-x) * m
        case "sft":
            return -policy[0].mean()
        case "sigmoid_norm":
            return -log(BETA * (cw / nw - cl / nl))


LOSSES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
    "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "kwargs"),
    [
        *(({"loss_type": [name], "label_smoothing": 0.1}, {"s": 0.1}) for name in LOSSES),
        *(({"f_divergence_type": k}, {"kind": k}) for k in ("forward_kl", "js_divergence", "alpha_divergence")),
        ({"ld_alpha": 0.4}, {"ld_alpha": 0.4}),
        ({"use_weighting": True}, {}),
        ({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, {}),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_every_loss_is_the_mixture_of_its_two_terms(make_trainer, settings, kwargs):
    trainer = make_trainer("llama", beta=BETA, personalization_alpha=0.3, **settings)
    disturb(trainer)
    row = 1  # one pair, of `bo`; the losses that sort a batch have nothing to sort
    example = dict(trainer.train_dataset[row])
    batch = trainer.data_collator([example])
    expected = 0.0
    for user, share in ((2, 0.3), (0, 0.7)):
        policy, reference, weight = by_hand(trainer, example, user)
        for name, loss_weight in zip(trainer.loss_types, trainer.loss_weights, strict=True):
            loss = pair_loss(name, policy, reference, **kwargs)
            expected = expected + share * loss_weight * loss * (weight if trainer.use_weighting else 1)
    loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=1e-6)
    found, wanted = (
        torch.autograd.grad(value, trainer.user_model.parameters(), retain_graph=True) for value in (loss, expected)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_losses_that_sort_a_batch_sort_each_term(make_trainer, loss_type):
    trainer = make_trainer(beta=BETA, personalization_alpha=0.3, loss_type=[loss_type])
    disturb(trainer)
    examples, batch = batch_of(trainer, [0, 1, 2, 3])
    expected = 0.0
    for users, share in (([1, 0, 0, 2], 0.3), ([0] * 4, 0.7)):
        sums = [by_hand(trainer, e, u)[:2] for e, u in zip(examples, users, strict=True)]
        w, lo, rw, rl = (
            torch.stack([row[i][j].sum() for row in sums]) for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))
        )  # fmt: skip
        pairs = (w - lo, rw - rl) if loss_type == "aot" else (w - rw, lo - rl)
        delta = pairs[0].sort().values - pairs[1].sort().values
        expected = expected + share * -F.logsigmoid(BETA * delta).mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, rtol=1e-5, atol=1e-6)


# --- Ways to train ----------------------------------------------------------------------------------------------------


def conversations(preferences, implicit=False):
    def message(role, text):
        return {"role": role, "content": text.strip()}

    rows = []
    for row in preferences:
        prompt = [message("user", row["prompt"])]
        chosen, rejected = [message("assistant", row["chosen"])], [message("assistant", row["rejected"])]
        rows.append(
            {"chosen": prompt + chosen, "rejected": prompt + rejected, "user_id": row["user_id"]}
            if implicit
            else {"prompt": prompt, "chosen": chosen, "rejected": rejected, "user_id": row["user_id"]}
        )
    return Dataset.from_list(rows)


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] == 'user' and 'i ' or 'yes ' }}{{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}yes {% endif %}"
)


def chat_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def implicit_prompt(preferences):
    return preferences.map(
        lambda row: {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]},
        remove_columns="prompt",
    )


def with_columns(preferences):
    rows = conversations(preferences)
    return rows.add_column("tools", ["[]"] * 8).add_column("chat_template_kwargs", [{"enable_thinking": False}] * 8)


DATA = {
    "plain": lambda rows: (rows, None),
    "implicit-prompt": lambda rows: (implicit_prompt(rows), None),
    "conversational": lambda rows: (conversations(rows), chat_tokenizer()),
    "conversational-implicit": lambda rows: (conversations(rows, implicit=True), chat_tokenizer()),
    "tools-and-template-arguments": lambda rows: (with_columns(rows), chat_tokenizer()),
    "stream": lambda rows: (rows.to_iterable_dataset(), None),
}

MODES = {
    "precompute": {"precompute_ref_log_probs": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "truncation": {"max_length": 6},
    "no-max-length": {"max_length": None},
    "pad-to-multiple": {"pad_to_multiple_of": 8},
    "dropout": {"disable_dropout": False},
    "keep-columns": {"remove_unused_columns": False},
    "adafactor": {"optim": "adafactor"},
    "neftune": {"neftune_noise_alpha": 5.0},
    "sync-ref": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
}


def build(make_trainer, make_args, trainer_class, kind, mode=None, data="plain", preferences=None, **kwargs):
    settings = {"max_steps": 3, **(MODES[mode] if mode else {})}
    args = (
        make_args(DPOConfig, **settings)
        if trainer_class is DPOTrainer
        else make_args(user_model_kind=kind, **settings)
    )
    trainer_kwargs = dict(kwargs)
    if preferences is not None:
        dataset, tokenizer = DATA[data](preferences)
        trainer_kwargs |= {"train_dataset": dataset} | ({"processing_class": tokenizer} if tokenizer else {})
    return make_trainer("llama", trainer_class=trainer_class, args=args, trainer_kwargs=trainer_kwargs)


def assert_same_run(one, other):
    assert history(one) == history(other)
    for (name, tensor), (_, expected) in zip(
        one.model.named_parameters(), other.model.named_parameters(), strict=True
    ):
        assert torch.equal(tensor, expected), name


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("mode", MODES)
def test_modes_without_users_are_trls_to_the_last_bit(make_trainer, make_args, mode):
    runs = []
    for trainer_class in (DPOTrainer, PersonalizedDPOTrainer):
        runs.append(build(make_trainer, make_args, trainer_class, "none", mode))
        runs[-1].train()
    assert_same_run(*runs)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(SIZES))
def test_every_family_without_users_is_trls_to_the_last_bit(make_trainer, make_args, preferences, tmp_path, family):
    make_family(family).save_pretrained(tmp_path / "model")
    make_tokenizer(family=family).save_pretrained(tmp_path / "model")
    kwargs = {"model": str(tmp_path / "model"), "eval_dataset": preferences}
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    timing, runs = TIMING | {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}, []
    for trainer_class, args in (
        (DPOTrainer, make_args(DPOConfig, **settings)),
        (PersonalizedDPOTrainer, make_args(user_model_kind="none", **settings)),
    ):
        trainer = make_trainer(trainer_class=trainer_class, args=args, trainer_kwargs=kwargs)
        trainer.train()
        runs.append([{k: v for k, v in log.items() if k not in timing} for log in trainer.state.log_history])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("data", DATA)
def test_data_without_users_are_trls_to_the_last_bit(make_trainer, make_args, preferences, data):
    runs = [
        build(make_trainer, make_args, trainer_class, "none", data=data, preferences=preferences)
        for trainer_class in (DPOTrainer, PersonalizedDPOTrainer)
    ]
    for trainer in runs:
        trainer.train()
    assert_same_run(*runs)


@pytest.mark.parametrize("mode", MODES)
def test_modes_train_users(make_trainer, make_args, mode):
    trainer = build(make_trainer, make_args, PersonalizedDPOTrainer, "individual", mode)
    trainer.train()
    offsets = trainer.user_model.user_offsets.weight
    assert torch.isfinite(offsets).all()
    assert offsets[0].abs().sum() == 0
    assert (offsets[1:].abs().sum(1) > 0).all()
    assert not torch.allclose(offsets[1], offsets[2])


@pytest.mark.parametrize("data", DATA)
def test_data_formats_bring_their_users(make_trainer, make_args, preferences, data):
    trainer = build(make_trainer, make_args, PersonalizedDPOTrainer, "individual", data=data, preferences=preferences)
    assert list(trainer.user_vocab) == ["ann", "bo"]
    trainer.train()
    assert (trainer.user_model.user_offsets.weight[1:].abs().sum(1) > 0).all()


@pytest.mark.parametrize("mode", ["checkpointing", "reentrant", "pad-to-multiple", "keep-columns", "precompute"])
def test_modes_that_change_no_number(make_trainer, make_args, mode):
    runs = [build(make_trainer, make_args, PersonalizedDPOTrainer, "individual", m) for m in (None, mode)]
    for trainer in runs:
        trainer.train()
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_truncation_never_cuts_the_soft_prompt(make_trainer):
    trainer = make_trainer(max_length=5, num_virtual_tokens=4, share_prefix="never")
    lengths = []
    trainer.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(
            kwargs["inputs_embeds"].shape[1] if "inputs_embeds" in kwargs else 0
        ),
        with_kwargs=True,
    )
    trainer.train()
    assert set(lengths) == {5 + 4}


def test_synced_reference_follows_the_policy_without_its_users(make_trainer):
    trainer = make_trainer(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0)
    trainer.train()
    reference = dict(trainer.ref_model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        if name.startswith("user_model."):
            assert name not in reference
        else:
            assert torch.equal(parameter, reference[name]), name


def test_explicit_reference_model_is_the_reference(make_trainer):
    reference = make_model("gptj", seed=7)
    trainer = make_trainer(beta=BETA, trainer_kwargs={"ref_model": reference})
    _, batch = batch_of(trainer, [0, 1, 2, 3])
    chosen, _ = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    with torch.no_grad():
        by_hand_chosen = [
            token_log_probs(reference, dict(trainer.train_dataset[row]), "chosen_ids")[0].sum() for row in range(4)
        ]
    torch.testing.assert_close(chosen, torch.stack(by_hand_chosen), rtol=1e-5, atol=1e-5)
    assert trainer.ref_model is reference


def test_adapter_passed_in_is_its_own_reference(make_trainer, model_dirs):
    base = AutoModelForCausalLM.from_pretrained(model_dirs["gptj"])
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    start = model(ids).logits.detach()
    trainer = make_trainer(max_steps=3, trainer_kwargs={"model": model, "processing_class": make_tokenizer()})
    assert "ref" in trainer.model.peft_config
    trainer.train()
    trainer.model.eval()
    assert not torch.allclose(trainer.model(ids).logits, start)
    trainer.model.set_adapter("ref")
    torch.testing.assert_close(trainer.model(ids).logits, start)


# --- Precomputed reference --------------------------------------------------------------------------------------------


def count_reference_passes(monkeypatch):
    passes = []
    original = DPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(
        DPOTrainer, "compute_ref_log_probs", lambda self, *args: passes.append(1) or original(self, *args)
    )
    return passes


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_sweep_over_users_computes_the_reference_once(make_trainer, preferences, monkeypatch, tmp_path, lora, where):
    if where == "disk":
        preferences.to_json(tmp_path / "rows.jsonl")
        preferences = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
    marker = preferences.map(lambda row: {"prompt": f"{row['prompt']} {'no' if lora else 'yes'} {where[:1]}"})
    passes = count_reference_passes(monkeypatch)
    log_probs = []
    for sweep in (
        {"personalization_alpha": 0.5},
        {"personalization_alpha": 0.9, "output_dir": str(tmp_path / "other")},
        {"num_virtual_tokens": 5},
        {"user_model_kind": "cluster", "seed": 3},
        {"learning_rate": 1.0, "beta": 0.9, "user_learning_rate": 0.1},
    ):
        trainer = make_trainer(
            lora=lora, precompute_ref_log_probs=True, **sweep, trainer_kwargs={"train_dataset": marker}
        )
        log_probs.append(trainer.train_dataset["ref_chosen_logps"][:])
        assert trainer.train_dataset["user_id"][:] == preferences["user_id"][:]
        assert len(passes) == 2  # eight pairs in batches of four, in the first run only
    assert all(values == log_probs[0] for values in log_probs)
    for changed in ({"max_length": 7}, {"ld_alpha": 0.5}):
        make_trainer(lora=lora, precompute_ref_log_probs=True, **changed, trainer_kwargs={"train_dataset": marker})
    assert len(passes) == 6
    other = {"train_dataset": marker, "ref_model": make_model(seed=9)}
    make_trainer(precompute_ref_log_probs=True, trainer_kwargs=other)
    assert len(passes) == 8


def test_other_users_of_the_same_pairs_share_the_reference_but_not_the_names(make_trainer, preferences, monkeypatch):
    first = preferences.map(lambda row: {"prompt": row["prompt"] + " dogs cats"})
    make_trainer(precompute_ref_log_probs=True, trainer_kwargs={"train_dataset": first})
    passes = count_reference_passes(monkeypatch)
    second = first.map(lambda row: {"user_id": row["user_id"] + "-2"})
    trainer = make_trainer(precompute_ref_log_probs=True, trainer_kwargs={"train_dataset": second})
    assert list(trainer.user_vocab) == ["ann-2", "bo-2"]
    assert not passes


# --- Evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dataset", "stream", "dict", "DatasetDict", "IterableDatasetDict"])
def test_evaluation_sets_in_every_form(make_trainer, preferences, form):
    some = preferences.select(range(4))
    eval_dataset = {
        "dataset": preferences,
        "stream": preferences.to_iterable_dataset(),
        "dict": {"all": preferences, "some": some},
        "DatasetDict": DatasetDict({"all": preferences, "some": some}),
        "IterableDatasetDict": IterableDatasetDict(
            {"all": preferences.to_iterable_dataset(), "some": some.to_iterable_dataset()}
        ),
    }[form]
    trainer = make_trainer(trainer_kwargs={"eval_dataset": eval_dataset}, per_device_eval_batch_size=4)
    trainer.train()
    metrics = trainer.evaluate()
    expected = trainer.evaluate(preferences)
    name = "eval_all_loss" if "ict" in form else "eval_loss"
    assert metrics[name] == pytest.approx(expected["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_evaluate_takes_a_new_dataset_after_training(make_trainer, preferences, lora):
    trainer = make_trainer(lora=lora)
    trainer.train()
    metrics = trainer.evaluate(preferences)
    assert metrics["eval_users/accuracy_mean"] >= 0
    again = trainer.evaluate({"one": preferences, "two": preferences})
    assert again["eval_one_loss"] == again["eval_two_loss"] == pytest.approx(metrics["eval_loss"])


def test_precomputed_reference_reaches_evaluation_sets(make_trainer, preferences):
    plain = make_trainer(trainer_kwargs={"eval_dataset": preferences})
    ahead = make_trainer(precompute_ref_log_probs=True, trainer_kwargs={"eval_dataset": preferences})
    assert "ref_chosen_logps" in ahead.eval_dataset.column_names
    assert ahead.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_predict(make_trainer, preferences):
    trainer = make_trainer(trainer_kwargs={"eval_dataset": preferences})
    prediction = trainer.predict(trainer.eval_dataset)
    assert prediction.metrics["test_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


def test_predicting_does_not_count_in_the_next_evaluation(make_trainer, preferences):
    trainer = make_trainer(trainer_kwargs={"eval_dataset": preferences})
    expected = trainer.evaluate()["eval_users/accuracy_mean"]
    flipped = preferences.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    flipped_trainer = make_trainer(trainer_kwargs={"train_dataset": flipped})
    trainer.predict(flipped_trainer.train_dataset)
    assert trainer.evaluate()["eval_users/accuracy_mean"] == expected


# --- Beside training ----


def test_alpha_of_one_trains_the_users_term_alone(make_trainer, monkeypatch):
    trainer = make_trainer(personalization_alpha=1.0)
    calls = []
    original = DPOTrainer.compute_loss
    monkeypatch.setattr(DPOTrainer, "compute_loss", lambda self, *args: calls.append(1) or original(self, *args))
    trainer.train()
    assert len(calls) == 2  # one a step
    assert not [name for log in trainer.state.log_history for name in log if "generic" in name]


@pytest.mark.slow
def test_dynamo_traces_the_hooks(make_trainer):
    """The same numbers with `torch.compile`, here with its tracer alone."""
    runs = [
        make_trainer("llama", optim="sgd", max_steps=2, **settings)
        for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"})
    ]
    for trainer in runs:
        trainer.train()
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_callback_that_generates_gets_the_generic_user(make_trainer, lora):
    texts = []

    class Sample(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            ids = torch.tensor([[4, 5, 6]])
            sequences = [
                model.generate(ids, max_new_tokens=4, do_sample=False, **users)
                for users in ({}, {"user_ids": [None]}, {"user_ids": "ann"})
            ]
            texts.append([sequence.tolist() for sequence in sequences])

    trainer = make_trainer(lora=lora, learning_rate=1e-4, user_learning_rate=1.0, max_steps=4)
    trainer.add_callback(Sample())
    trainer.train()
    assert len(texts) == 4
    assert all(default == generic for default, generic, _ in texts)
    assert texts[-1][0] != texts[-1][2]


def test_hyperparameter_search_says_what_trl_says(make_trainer, make_args):
    """TRL's trainer takes no `model_init`, which a search needs."""
    messages = []
    for trainer_class, args in ((DPOTrainer, make_args(DPOConfig)), (PersonalizedDPOTrainer, make_args())):
        with pytest.raises(RuntimeError) as error:
            make_trainer(trainer_class=trainer_class, args=args).hyperparameter_search(backend="optuna")
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_unbalanced_users_can_be_sampled_evenly(make_trainer, preferences):
    """As in transformers: a trainer with a sampler of one's own."""
    rows = Dataset.from_list([preferences[0]] * 7 + [preferences[1]])

    class Balanced(PersonalizedDPOTrainer):
        def _get_train_sampler(self, train_dataset=None):
            users = self.train_dataset["user_id"][:]
            weights = [1 / users.count(user) for user in users]
            return torch.utils.data.WeightedRandomSampler(weights, 200, generator=torch.Generator().manual_seed(0))

    trainer = make_trainer(trainer_class=Balanced, trainer_kwargs={"train_dataset": rows})
    users = torch.cat([batch["user_indices"] for batch in trainer.get_train_dataloader()])
    assert (users == 2).float().mean() == pytest.approx(0.5, abs=0.1)


# --- Kinds of models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_balance_in_both_terms(make_trainer, tmp_path, family):
    model = make_family(family)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer(family=family).save_pretrained(tmp_path / "model")
    kwargs = {"model": str(tmp_path / "model")}
    trainer = make_trainer(router_aux_loss_coef=0.5, trainer_kwargs=kwargs)
    plain = make_trainer(router_aux_loss_coef=0.0, trainer_kwargs=kwargs)
    assert trainer.aux_loss_enabled
    _, batch = batch_of(trainer, [0, 1, 2, 3])
    loss = trainer.compute_loss(trainer.model, batch)
    without = plain.compute_loss(plain.model, batch)
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    aux = 0.5 * metrics["aux_loss"][0] + 0.5 * metrics["generic/aux_loss"][0]
    assert loss.item() - without.item() == pytest.approx(0.5 * aux, rel=1e-4)
    trainer.train()


@pytest.mark.parametrize("family", ["lfm2", "mamba"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_models_with_a_state_train_users(make_trainer, tmp_path, family, lora):
    make_family(family).save_pretrained(tmp_path / "model")
    make_tokenizer(family=family).save_pretrained(tmp_path / "model")
    targets = LoraConfig(task_type="CAUSAL_LM", target_modules=["in_proj"]) if lora else None
    trainer = make_trainer(trainer_kwargs={"model": str(tmp_path / "model"), "peft_config": targets})
    trainer.train()
    assert (trainer.user_model.user_offsets.weight[1:].abs().sum(1) > 0).all()


def test_every_parameter_that_should_move_moves(make_trainer):
    for lora, kind in itertools.product((False, True), ("individual", "cluster")):
        trainer = make_trainer("llama", lora, user_model_kind=kind, max_steps=3, learning_rate=0.1)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        for name, parameter in trainer.model.named_parameters():
            should_move = not lora or "lora" in name or "user_model" in name
            assert torch.equal(before[name], parameter) != should_move, name
