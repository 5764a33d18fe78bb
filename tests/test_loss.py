"""Loss and gradients of a batch equal a computation by hand, in plain torch, with embeddings concatenated by hand."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, KINDS
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from trl_personal.models.saving import get_base_model


BOS = 1
BETA = 0.3


def disturb(trainer, seed=11):
    """Move policy and users away from the start, where policy and reference are one and all users are the generic one."""
    torch.manual_seed(seed)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    if trainer.user_model is not None:
        for module in trainer.user_model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.data.add_(torch.randn_like(module.weight))
                if module.padding_idx is not None:
                    module.weight.data[module.padding_idx] = 0


def soft_prompt_by_hand(user_model, user):
    shape = (user_model.config.num_virtual_tokens, user_model.config.token_dim)
    if user == 0 and user_model.kind != "cluster":
        return user_model.generic_prompt
    if user_model.kind == "individual":
        return user_model.generic_prompt + user_model.user_offsets.weight[user].reshape(shape)
    if user_model.kind == "cluster":
        weights = user_model.user_logits.weight[user].exp()
        return (weights[:, None, None] * user_model.cluster_prompts).sum(0) / weights.sum()
    mixed = sum(z * b for z, b in zip(user_model.user_factors.weight[user], user_model.shared_basis, strict=True))
    return user_model.generic_prompt + mixed


def log_prob_by_hand(causal_lm, prompt_ids, completion_ids, soft_prompt=None):
    """log pi(completion | soft prompt, prompt): [BOS] e prompt completion, one row, no padding, no mask."""
    ids = torch.tensor(prompt_ids + completion_ids)
    embeds = causal_lm.get_input_embeddings()(ids)
    if soft_prompt is not None:
        position = 1 if ids[0] == BOS else 0
        embeds = torch.cat([embeds[:position], soft_prompt, embeds[position:]])
    log_probs = causal_lm(inputs_embeds=embeds[None], use_cache=False).logits[0].log_softmax(-1)
    n = len(completion_ids)
    return log_probs[-n - 1 : -1].gather(1, torch.tensor(completion_ids)[:, None]).sum()


def reference_log_probs_by_hand(trainer, examples):
    with torch.no_grad():
        if trainer.ref_model is not None:
            return [
                [
                    log_prob_by_hand(trainer.ref_model, e["prompt_ids"], e[name])
                    for name in ("chosen_ids", "rejected_ids")
                ]
                for e in examples
            ]
        with trainer.model.disable_adapter():
            causal_lm = get_base_model(trainer.model)
            return [
                [log_prob_by_hand(causal_lm, e["prompt_ids"], e[name]) for name in ("chosen_ids", "rejected_ids")]
                for e in examples
            ]


def loss_by_hand(trainer, examples, alpha):
    causal_lm, vocab = get_base_model(trainer.model), list(trainer.user_vocab)
    references = reference_log_probs_by_hand(trainer, examples)
    terms = []
    for example, (ref_chosen, ref_rejected) in zip(examples, references, strict=True):
        user = vocab.index(example["user_id"]) + 1 if example["user_id"] in vocab else 0
        for row, weight in ((user, alpha), (0, 1 - alpha)):
            e = soft_prompt_by_hand(trainer.user_model, row)
            chosen = log_prob_by_hand(causal_lm, example["prompt_ids"], example["chosen_ids"], e)
            rejected = log_prob_by_hand(causal_lm, example["prompt_ids"], example["rejected_ids"], e)
            terms.append(-weight * F.logsigmoid(BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))))
    return torch.stack(terms).sum() / len(examples)


def gradients(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def batch_of(trainer, rows):
    examples = [dict(trainer.train_dataset[row]) for row in rows]
    examples[1]["user_id"] = "somebody unknown"
    examples[2]["user_id"] = None
    return examples, trainer.data_collator([dict(example) for example in examples])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("num_virtual_tokens", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_loss_and_gradients_equal_the_hand_computation(make_trainer, family, kind, num_virtual_tokens, lora):
    trainer = make_trainer(
        family,
        lora,
        user_model_kind=kind,
        num_virtual_tokens=num_virtual_tokens,
        num_clusters=3,
        beta=BETA,
    )
    disturb(trainer)
    trainer.model.train()
    for alpha, rows in itertools.product((0.3, 1.0), ([0, 1, 2, 3, 5],)):
        trainer.args.personalization_alpha = alpha
        examples, batch = batch_of(trainer, rows)
        assert set(batch["user_indices"].tolist()) == {0, 1, 2}
        loss = trainer.compute_loss(trainer.model, batch)
        expected = loss_by_hand(trainer, examples, alpha)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        assert abs(expected.item() - 0.6931) > 1e-4  # the test would see nothing at the starting point
        found, wanted = gradients(trainer, loss), gradients(trainer, expected)
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(
                found[name], wanted[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_evaluation_loss_is_the_same_mixture(make_trainer, preferences):
    trainer = make_trainer(personalization_alpha=0.3, beta=BETA, per_device_eval_batch_size=3)
    disturb(trainer)
    metrics = trainer.evaluate(preferences.select(range(6)))
    examples = [dict(trainer.train_dataset[row]) for row in range(6)]
    assert metrics["eval_loss"] == pytest.approx(loss_by_hand(trainer, examples, 0.3).item(), rel=1e-5)


def test_metrics_of_the_two_terms_are_kept_apart(make_trainer):
    trainer = make_trainer(beta=BETA)
    disturb(trainer)
    examples, batch = batch_of(trainer, [0, 1, 2, 3])
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    metrics = trainer._metrics["train"]
    causal_lm = get_base_model(trainer.model)
    for prefix, users in (("", [1, 0, 0, 2]), ("generic/", [0, 0, 0, 0])):
        chosen = [
            log_prob_by_hand(
                causal_lm, e["prompt_ids"], e["chosen_ids"], soft_prompt_by_hand(trainer.user_model, user)
            ).item()
            for e, user in zip(examples, users, strict=True)
        ]
        assert metrics[prefix + "logps/chosen"] == [pytest.approx(sum(chosen) / 4, rel=1e-5)]
    assert metrics["num_tokens"] == [batch["attention_mask"].sum().item()]  # counted once for both terms
    assert "generic/num_tokens" not in metrics


def test_metrics_without_a_prefix_are_those_of_the_users_own_soft_prompt(make_trainer):
    trainer = make_trainer(beta=0.3)
    disturb(trainer)
    examples, batch = batch_of(trainer, [0, 1, 2, 3])
    trainer.model.eval()
    trainer.compute_loss(trainer.model, batch)
    metrics = trainer._metrics["eval"]
    for prefix, users in (("", [1, 0, 0, 2]), ("generic/", [0, 0, 0, 0])):
        chosen = [
            log_prob_by_hand(
                trainer.model, e["prompt_ids"], e["chosen_ids"], soft_prompt_by_hand(trainer.user_model, u)
            )
            for e, u in zip(examples, users, strict=True)
        ]
        assert metrics[prefix + "logps/chosen"] == [pytest.approx(sum(map(float, chosen)) / 4, rel=1e-5)]
    assert not [name for name in metrics if "swap" in name]


def test_reference_runs_once_per_pair_and_sees_no_user(make_trainer, monkeypatch):
    trainer = make_trainer()
    calls = []
    original = DPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(
        DPOTrainer,
        "compute_ref_log_probs",
        lambda self, model, inputs: calls.append((model, set(inputs))) or original(self, model, inputs),
    )
    trainer.train()
    assert len(calls) == 2  # two steps
    assert all(model is trainer.ref_model and "user_indices" not in names for model, names in calls)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_reference_never_moves_while_users_do(make_trainer, lora):
    trainer = make_trainer(lora=lora, max_steps=3)
    examples, batch = batch_of(trainer, [0, 1, 2, 3])
    reference = trainer.ref_model or trainer.model
    before = trainer.compute_ref_log_probs(reference, batch)
    users = copy.deepcopy(trainer.user_model.state_dict())
    trainer.train()
    after = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    assert any(not torch.equal(users[name], tensor) for name, tensor in trainer.user_model.state_dict().items())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_precomputed_reference_gives_the_same_training(make_trainer, lora, tmp_path):
    runs = [
        make_trainer(lora=lora, max_steps=3, optim="sgd", precompute_ref_log_probs=precompute)
        for precompute in (False, True)
    ]
    for trainer in runs:
        trainer.train()
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_none_is_trl_to_the_last_bit(make_trainer, make_args):
    runs = []
    for trainer_class, args in (
        (DPOTrainer, make_args(DPOConfig, max_steps=5)),
        (None, make_args(max_steps=5, user_model_kind="none")),
    ):
        trainer = make_trainer(args=args, **({"trainer_class": trainer_class} if trainer_class else {}))
        trainer.train()
        runs.append(trainer)
    theirs, ours = runs
    timing = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    histories = [[{k: v for k, v in log.items() if k not in timing} for log in r.state.log_history] for r in runs]
    assert histories[0] == histories[1]  # loss, gradients' norm, rewards, log-probabilities, ...
    assert len(histories[0]) == 6
    assert theirs.model.state_dict().keys() == ours.model.state_dict().keys()
    for name, tensor in theirs.model.state_dict().items():
        assert torch.equal(tensor, ours.model.state_dict()[name]), name


@pytest.mark.parametrize("family", ["gptj", "llama"])
def test_eight_accumulated_single_pairs_equal_a_batch_of_eight(make_trainer, family):
    runs = []
    for batch_size in (1, 8):
        trainer = make_trainer(
            family,
            optim="sgd",
            learning_rate=0.5,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
        )
        start = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        runs.append(trainer)
    losses = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, tensor in runs[0].model.state_dict().items():
        torch.testing.assert_close(tensor, runs[1].model.state_dict()[name], rtol=1e-5, atol=1e-5)
        assert not tensor.is_floating_point() or "generic" not in name or not torch.equal(tensor, start[name])


def test_order_of_the_data_does_not_depend_on_users(make_trainer, preferences):
    dataset = Dataset.from_list(
        [{**row, "prompt": f"{row['prompt']} no" * (i + 1)} for i, row in enumerate(preferences)]
    )
    lengths = []
    for kind in ("individual", "none"):
        trainer = make_trainer(user_model_kind=kind, max_steps=4, trainer_kwargs={"train_dataset": dataset})
        trainer.train()
        lengths.append([log["num_tokens"] for log in trainer.state.log_history if "loss" in log])
    assert lengths[0] == lengths[1]
