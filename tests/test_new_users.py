"""Users who join a trained model: their rows alone are fitted, as a hand computation and other routes say."""

import copy
import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KINDS, make_model, make_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from trl_personal import AutoPersonalizedModelForCausalLM, UserVocab, attach_user_model
from trl_personal.cli.users import run_users
from trl_personal.cli.users_arguments import parse_users
from trl_personal.cli.users_fit import run_users_add, run_users_update
from trl_personal.cli.users_fit_arguments import make_users_add_parser, make_users_update_parser
from trl_personal.evaluation.scoring import score_pairs
from trl_personal.evaluation.trained_model import PAIRS, make_scoring_trainer
from trl_personal.models.saving import get_base_model
from trl_personal.new_users.choice import LinearMargins, _left_out, choose
from trl_personal.new_users.fit import (
    Hypothesis,
    Pairs,
    all_hypotheses,
    draw,
    fit,
    initial_shares,
    learn_shares,
    leave_one_out,
    log_likelihood,
    posterior,
)
from trl_personal.new_users.folder import write_users
from trl_personal.new_users.join import _fit_codes, _objective, add_users, settings_of, update_users
from trl_personal.new_users.margins import row_margins
from trl_personal.new_users.prior import RowPrior, is_linear, prior_of_users
from trl_personal.new_users.results import NOT_ENOUGH, fits_table
from trl_personal.terminal import print_whole
from trl_personal.training.run_folder import only_run_in
from trl_personal.user_models import get_user_model_class


SETTINGS = {"beta": 30.0, "max_length": 32, "user_id_column": "user_id"}
FORMS = ["full", "lora"]


def make_users(kind, num_users=4, token_dim=32, seed=0):
    torch.manual_seed(seed)
    cls = get_user_model_class(kind)
    options = {"num_clusters": 3} if kind == "cluster" else {"user_rank": 3} if kind == "low_rank" else {}
    user_model = cls(cls.config_class(num_users=num_users, num_virtual_tokens=3, token_dim=token_dim, **options))
    rows = {f"{name}.weight" for name in user_model.row_tables()}
    for name, parameter in user_model.named_parameters():  # small, so that margins are nearly linear in the rows
        is_offset = parameter.dim() == 2 and name == "user_offsets.weight"
        parameter.data.normal_(0, 0.05 if is_offset else 0.3 if name in rows else 0.1)
    for table in user_model.row_tables().values():
        if table.padding_idx == 0:
            table.weight.data[0] = 0
    return user_model


def make_personalized(kind="individual", family="gptj", form="full", num_users=4):
    """A model with known users, and its reference (none for an adapter)."""
    model, reference = make_model(family), make_model(family)  # margins come of soft prompts
    if form == "lora":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])).eval()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.02)
        reference = None
    attach_user_model(model, make_users(kind, num_users), UserVocab([f"known-{i}" for i in range(num_users)]))
    return model, reference


def make_pairs(num_users=2, num_pairs=3, seed=0, users=None):
    """Pairs of words; each new user likes an answer with the user's own word."""
    rng, words = np.random.default_rng(seed), "short long answer story dogs cats like yes".split()
    rows = []
    for number in range(num_users):
        for _ in range(num_pairs):
            prompt = " ".join(rng.choice(words, size=3))
            good, bad = f" {words[number % 8]} {rng.choice(words)}", f" {rng.choice(words)} no the end"
            user = f"new-{number}" if users is None else users[number]
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad, "user_id": user})
    return Dataset.from_list(rows)


def judged_by(model, reference, row, user, generic=0, num_pairs=6):
    """Pairs that the prompt of a known user's row and the generic prompt answer in different ways, judged by the first."""
    pairs = make_pairs(1, 80, users=[user])
    with row_margins(model, make_tokenizer(), pairs, SETTINGS, reference) as margins:
        rows = margins.flat_rows([row, generic])
        own, other = (margins.at(rows, torch.full((80,), number), gradients=False)[0] for number in (0, 1))
    swap = {"chosen": "rejected", "rejected": "chosen"}
    found = [
        {name: pair[swap.get(name, name)] if margin < 0 else pair[name] for name in pair}
        for pair, margin, differs in zip(pairs, own.tolist(), (own * other < 0).tolist(), strict=True)
        if differs
    ]
    assert len(found) >= num_pairs
    return Dataset.from_list(found[:num_pairs])


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def num_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# --- The margins, and a model that stays as it is


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["gptj", "llama"])
def test_margins_are_those_of_an_evaluation(family, form, model_dirs, make_trainer, preferences, tmp_path):
    trainer = make_trainer(family, lora=form == "lora", beta=0.3)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    reference = None if form == "lora" else model_dirs[family]
    found = score_pairs(make_scoring_trainer(str(tmp_path / "out"), preferences, SETTINGS, ref_model=reference), PAIRS)
    model = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "out")
    with row_margins(
        model, make_tokenizer(family == "llama", family), preferences, SETTINGS, reference and make_model(family), 3
    ) as margins:
        rows = margins.flat_rows(range(3))
        owner = torch.tensor([1, 2] * 4)
        own, _ = margins.at(rows, owner, gradients=False)
        generic, _ = margins.at(rows, owner * 0, gradients=False)
    np.testing.assert_allclose(own, found.margins["own"], atol=1e-4)
    np.testing.assert_allclose(generic, found.margins["generic"], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_are_those_of_differences(kind):
    model, reference = make_personalized(kind)
    with row_margins(model, make_tokenizer(), make_pairs(2, 2), SETTINGS, reference, 3) as margins:
        rows, owner = margins.flat_rows([1, 2]).double().float(), torch.tensor([0, 0, 1, 1])
        basis = 0.1 * torch.randn(2, margins.width, generator=torch.Generator().manual_seed(0))
        _, slopes = margins.at(rows, owner, basis)
        for number, direction in enumerate(basis):
            above, _ = margins.at(rows + 1e-2 * direction, owner, gradients=False)
            below, _ = margins.at(rows - 1e-2 * direction, owner, gradients=False)
            torch.testing.assert_close(slopes[:, number].double(), (above - below) / 2e-2, rtol=2e-2, atol=3e-2)
        assert is_linear(margins, rows[0], basis) == (kind != "cluster")


@pytest.mark.parametrize("form", FORMS)
def test_a_model_is_as_it_was_after_its_margins(form):
    model, reference = make_personalized(form=form)
    model.train()
    get_base_model(model).get_decoder().register_forward_hook(lambda module, args, output: None)  # the caller's own
    before = state_of(model)
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    user_model, hooks, cls = get_base_model(model).user_model, num_hooks(model), type(get_base_model(model))
    dropout = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    with row_margins(model, make_tokenizer(), make_pairs(), SETTINGS, reference) as margins:
        margins.at(margins.flat_rows([0]), torch.zeros(len(margins), dtype=torch.long))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()
    assert get_base_model(model).user_model is user_model
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == frozen
    assert num_hooks(model) == hooks
    assert type(get_base_model(model)) is cls
    assert model.training
    assert all(module.training for module in model.modules() if module is not user_model)
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == dropout
    assert "forward" not in vars(get_base_model(model))
    if reference is not None:
        assert num_hooks(reference) == 0


# --- The fit


def test_a_fit_is_the_minimum_of_its_objective():
    rng = torch.Generator().manual_seed(0)
    slopes = torch.randn(3, 7, 2, generator=rng, dtype=torch.float64)
    start = torch.randn(3, 7, generator=rng, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
    for noise in (0.0, 0.2):
        found = fit(Pairs(start, start, slopes, mask), Hypothesis(0.5, noise), 0.7).codes
        for user in range(3):
            z = found[user].clone().requires_grad_()
            margins = (start[user] + slopes[user] @ z)[mask[user]]
            loss = -torch.log(noise + (1 - 2 * noise) * torch.sigmoid(0.7 * margins)).sum() + 0.25 * (z**2).sum()
            (gradient,) = torch.autograd.grad(loss, z)
            assert gradient.abs().max() < 1e-2


def test_evidence_is_the_integral_over_codes():
    """Against a sum over a fine grid of one code."""
    start = torch.tensor([[0.4, -1.0, 0.3]], dtype=torch.float64)
    slopes = torch.tensor([[[2.0], [1.5], [-0.5]]], dtype=torch.float64)
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = torch.linspace(-30, 30, 20001, dtype=torch.float64)
    for hypothesis in (Hypothesis(0.1, 0.0), Hypothesis(1.0, 0.2)):
        found = draw(Pairs(start, start, slopes, start > -9), hypothesis, 0.8, noise)
        margins = start + z[:, None] * slopes[0, :, 0]
        density = torch.exp(-hypothesis.precision * z**2 / 2) * (hypothesis.precision / 2 / torch.pi) ** 0.5
        weight = log_likelihood(margins, 0.8, hypothesis.noise).sum(1).exp() * density
        assert found.evidence.exp().item() == pytest.approx(torch.trapezoid(weight, z).item(), rel=0.03)
        mean = (torch.trapezoid(weight * z, z) / torch.trapezoid(weight, z)).item()
        assert (found.weights[0] @ found.codes[0, :, 0]).item() == pytest.approx(mean, abs=0.15)


def test_an_answer_that_is_left_out_is_predicted_by_the_others():
    """Against the same integrals over a grid, of two hypotheses together."""
    start = torch.tensor([[0.4, -1.0, 0.3]], dtype=torch.float64)
    slopes = torch.tensor([[[1.0], [1.5], [-0.5]]], dtype=torch.float64)
    pairs, beta = Pairs(start, start, slopes, start > -9), 0.8
    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hypotheses = [Hypothesis(0.5, 0.1), Hypothesis(float("inf"), 0.2)]
    draws = [draw(pairs, h, beta, noise) for h in hypotheses]
    evidence = torch.stack([found.evidence for found in draws])
    shares = torch.tensor([0.3, 0.7], dtype=torch.float64)
    parts = torch.stack([leave_one_out(pairs, h, found, beta) for h, found in zip(hypotheses, draws, strict=True)])
    (found,) = _left_out(posterior(evidence, shares), parts)
    z = torch.linspace(-20, 20, 20_001, dtype=torch.float64)
    density = torch.exp(-0.25 * z**2) * (0.25 / torch.pi) ** 0.5
    for left in range(3):
        others = [number for number in range(3) if number != left]
        margins = start[0] + z[:, None] * slopes[0, :, 0]
        weight = log_likelihood(margins[:, others], beta, 0.1).sum(1).exp() * density
        without, right = (
            torch.trapezoid(weight, z),
            torch.trapezoid(weight * torch.sigmoid(beta * margins[:, left]), z),
        )
        at_start = log_likelihood(start[0, others], beta, 0.2).sum().exp()
        expected = (0.3 * right + 0.7 * at_start * torch.sigmoid(beta * start[0, left])) / (
            0.3 * without + 0.7 * at_start
        )
        assert found[left].item() == pytest.approx(expected.item(), abs=0.01)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_what_is_expected_of_users_comes_out(noise):
    """Users who follow a rule are right more often than margins say, and those who slip now and then are not."""
    rng = np.random.default_rng(5)
    tastes = rng.normal(size=(20, 2))
    choices = choose(synthetic(20, 15, tastes, noise=noise, seed=1), beta=0.3)
    further = rng.normal(size=(20, 500, 2)) * 4
    sides = np.sign((further * tastes[:, None]).sum(2))
    codes = np.stack([choices[user].codes.numpy() for user in range(20)])
    right = (np.sign((further * codes[:, None]).sum(2)) == sides).mean(1)
    right = (1 - noise) * right + noise * (1 - right)
    expected = np.array([choices[user].accuracy for user in range(20)])
    assert expected.mean() == pytest.approx(right.mean(), abs=0.05)
    inside = [choices[user].low - 0.02 <= right[user] <= choices[user].high + 0.02 for user in range(20)]
    assert np.mean(inside) >= 0.7


def test_evidence_of_a_start_row_is_the_probability_of_the_answers():
    start = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    pairs = Pairs(start, start, torch.zeros(1, 2, 3, dtype=torch.float64), start > -9)
    by_hypothesis = {h: draw(pairs, h, 0.5, torch.zeros(4, 3)).evidence.exp().item() for h in all_hypotheses()[:3]}
    right = 1 / (1 + np.exp([-1.0, 0.5]))
    assert by_hypothesis[Hypothesis(float("inf"), 0.5)] == pytest.approx(0.25)
    assert by_hypothesis[Hypothesis(float("inf"), 0.0)] == pytest.approx(right.prod())
    assert by_hypothesis[Hypothesis(float("inf"), 0.1)] == pytest.approx((0.1 + 0.8 * right).prod())


def test_shares_go_to_what_most_users_answer_like():
    hypotheses = all_hypotheses()
    initial = initial_shares(hypotheses)
    assert initial.sum().item() == pytest.approx(1)
    evidence = torch.full((len(hypotheses), 50), -20.0, dtype=torch.float64)
    evidence[7] = 0.0
    shares = learn_shares(evidence, initial)
    assert shares[7].item() == pytest.approx((initial[7].item() + 50) / 51, abs=1e-3)
    assert posterior(evidence, shares)[7].min() > 0.99


def test_directions_are_those_in_which_users_differ():
    known = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 3.0], [1.0, 4.0, 3.0]])
    basis = prior_of_users(torch.tensor([[1.0, 2.0, 3.0]]), known)
    assert basis.shape == (1, 3)
    torch.testing.assert_close(basis.abs(), torch.tensor([[0.0, (8 / 3) ** 0.5, 0.0]]))


def synthetic(num_users, num_pairs, tastes, noise=0.0, seed=0, start=0.0):
    """Users with a code each; a pair's margin is `start` (to the majority's side) plus slopes times the code."""
    rng = np.random.default_rng(seed)
    slopes = rng.normal(size=(num_users, num_pairs, 2)) * 4
    sides = np.sign(slopes @ np.array([1.0, 0.0]))[..., None]
    slopes = slopes * sides  # the pair as the majority answers it
    answers = np.sign((slopes * tastes[:, None]).sum(2) + 1e-9)
    answers = np.where(rng.random(answers.shape) < noise, -answers, answers)
    owner = torch.arange(num_users).repeat_interleave(num_pairs)
    margins = torch.tensor(start * answers.ravel(), dtype=torch.float64)
    return LinearMargins(
        margins, margins.clone(), torch.tensor((slopes * answers[..., None]).reshape(-1, 2)), owner, num_users
    )


def test_users_who_agree_with_themselves_get_rows_of_their_own():
    rng = np.random.default_rng(3)
    tastes = rng.normal(size=(10, 2))
    choices = choose(synthetic(10, 12, tastes), beta=1.0)
    codes = np.stack([choices[user].codes.numpy() for user in range(10)])
    cosine = (codes * tastes).sum(1) / np.linalg.norm(codes, axis=1) / np.linalg.norm(tastes, axis=1)
    assert cosine.min() > 0.8
    assert all(choice.probability_of_gain > 0.95 for choice in choices.values())
    assert all(choice.low <= choice.accuracy <= choice.high for choice in choices.values())


@pytest.mark.parametrize("num_pairs", [1, 10])
def test_users_who_answer_by_chance_stay_where_the_majority_is(num_pairs):
    margins = synthetic(20, num_pairs, np.tile([1.0, 0.0], (20, 1)), noise=0.5, start=1.5)
    choices = choose(margins, beta=1.0)
    rng = np.random.default_rng(9)
    test = rng.normal(size=(400, 2)) * 4
    test *= np.sign(test[:, :1])
    right = [((1.5 + test @ choices[user].codes.numpy()) > 0).mean() for user in range(20)]
    assert np.mean(right) >= 0.98


@pytest.mark.parametrize(("start", "moves"), [(0.1, True), (0.8, False), (1.5, False)])
def test_one_answer_alone_moves_nobody_far_from_a_majority(start, moves):
    """Where the start row is nearly a coin there is nothing to lose, and the answer is followed."""
    margins = synthetic(1, 1, np.array([[-1.0, 0.0]]), start=start)
    (choice,) = choose(margins, beta=1.0).values()
    assert choice.codes.any().item() == moves
    assert moves or choice.probability_of_gain == 0


@pytest.mark.parametrize("num_pairs", [1, 3, 4])
def test_a_few_answers_count_whole_where_the_start_row_is_undecided(num_pairs):
    """Up to three: the mode of the widest prior without noise, though noise is as probable. From four on noise takes part."""
    tastes = np.random.default_rng(3).normal(size=(6, 2))
    margins = synthetic(6, num_pairs, tastes)
    choices = choose(margins, beta=1.0)
    pairs = [part.reshape(6, num_pairs, *part.shape[1:]) for part in (margins.start, margins.offset, margins.slopes)]
    modes = fit(Pairs(*pairs, torch.ones(6, num_pairs, dtype=torch.bool)), Hypothesis(0.2, 0.0), beta=1.0).codes
    codes = torch.stack([choices[user].codes for user in range(6)])
    assert codes.any(1).all()
    if num_pairs < 4:
        torch.testing.assert_close(codes, modes)
    else:
        assert (codes.norm(dim=1) < 0.95 * modes.norm(dim=1)).all()


class BentMargins:
    """Margins that are no line in the codes: they bend the other way, the sooner the further."""

    def __init__(self, slopes):
        self.slopes, self.num_scored = slopes, []

    def at(self, rows, owner, basis, gradients=True, numbers=None):
        numbers = torch.arange(len(owner)) if numbers is None else numbers
        self.num_scored.append(len(numbers))
        codes = rows[owner[numbers]].double().requires_grad_()
        slopes = self.slopes[numbers]
        margins = (slopes * codes).sum(1) - 0.2 * codes.square().sum(1) * slopes.norm(dim=1)
        (gradient,) = torch.autograd.grad(margins.sum(), codes)
        return margins.detach(), gradient.float() if gradients else None


def test_margins_that_bend_are_linearized_anew_for_those_for_whom_it_pays(monkeypatch):
    """Their true objective is lower then, and the row of a user who is left as is does not change."""
    tastes = np.array([[1.5, 0.5], [1.5, 0.5], [-0.5, 1.5]])
    margins, owner = synthetic(3, 20, tastes), torch.arange(3).repeat_interleave(20)
    bent, asked = BentMargins(margins.slopes), []

    def recorded(linear, beta, asks_others=True):
        asked.append(asks_others)
        return choose(linear, beta, asks_others)

    monkeypatch.setattr("trl_personal.new_users.join.choose", recorded)
    prior, start = RowPrior(torch.eye(2), True), torch.zeros(3, 2)
    found = []
    for times in ([0, 0, 0], [2, 0, 2]):
        bent.num_scored.clear()
        codes, choices = _fit_codes(bent, start, prior, owner, 1.0, torch.tensor(times), True)
        assert all(choice.hypothesis.moves for choice in choices.values())
        assert all(torch.equal(choices[user].codes, codes[user]) for user in range(3))  # what is told is of that row
        assert all(number == 40 for number in bent.num_scored[1:])  # those of two users
        values = []
        for user in range(3):
            hypothesis, of_user = choices[user].hypothesis, owner == user
            scored, _ = bent.at(codes.float(), owner, None)
            values.append(_objective(scored[of_user], codes[user], hypothesis, 1.0).item())
        found.append((codes, values))
    assert asked == [True, True, False, False]  # others only at the start row
    (first, at_first), (twice, at_twice) = found
    assert torch.equal(first[1], twice[1])
    assert at_twice[0] < 0.9 * at_first[0]
    assert at_twice[2] < 0.9 * at_first[2]


@pytest.mark.parametrize(("kind", "expected"), [("individual", [0, 2]), ("cluster", [2, 2])])
def test_many_pairs_are_linearized_anew(kind, expected, monkeypatch):
    model, reference = make_personalized(kind)
    asked = []

    def recorded(margins, start, prior, owner, beta, relinearizations, asks_others):
        asked.append(relinearizations.tolist())
        return _fit_codes(margins, start, prior, owner, beta, relinearizations, asks_others)

    monkeypatch.setattr("trl_personal.new_users.join._fit_codes", recorded)
    pairs = [*make_pairs(2, 16)][1:]
    model.add_users(Dataset.from_list(pairs), make_tokenizer(), reference, settings=SETTINGS)
    assert asked == [expected]


# --- Joining


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_only_new_rows_are_other_numbers_and_the_fit_is_better(kind, form):
    model, reference = make_personalized(kind, form=form)
    causal_lm = get_base_model(model)
    before, known = state_of(causal_lm), causal_lm.user_model.get_rows(range(5))
    pairs = judged_by(model, reference, 1, "new-0")
    result = model.add_users(pairs, make_tokenizer(), reference, settings=SETTINGS, user_ids=["new-0", "eve"])
    assert list(causal_lm.user_vocab) == [f"known-{i}" for i in range(4)] + ["new-0", "eve"]
    assert causal_lm.user_model.config.num_users == 6
    assert [user.num_pairs for user in result.users] == [6, 0]
    for name, rows in causal_lm.user_model.get_rows(range(5)).items():
        assert torch.equal(rows, known[name])
    tables = {f"user_model.{name}.weight" for name in causal_lm.user_model.row_tables()}
    for name, tensor in causal_lm.state_dict().items():
        assert name in tables or torch.equal(tensor, before[name]), name
    with row_margins(model, make_tokenizer(), pairs, SETTINGS, reference) as margins:
        own, _ = margins.at(margins.flat_rows([5]), torch.zeros(6, dtype=torch.long), gradients=False)
        generic, _ = margins.at(margins.flat_rows([0]), torch.zeros(6, dtype=torch.long), gradients=False)
    assert generic.max() < 0
    assert own.mean() > generic.mean() - 1e-4
    generic_row, own_row = (causal_lm.user_model.get_rows([row]) for row in (0, 5))
    assert result.users[0].moved == any(not torch.equal(generic_row[name], own_row[name]) for name in own_row)
    assert result.knows_spread


@pytest.mark.parametrize("kind", KINDS)
def test_without_pairs_a_user_has_the_generic_prompt_bit_for_bit(kind):
    model, _ = make_personalized(kind)
    result = model.add_users(None, make_tokenizer(), user_ids=["eve", 7], settings=SETTINGS)
    with torch.no_grad():
        prompts = model.user_model(torch.tensor([0, 5, 6]))
    assert torch.equal(prompts[1], prompts[0])
    assert torch.equal(prompts[2], prompts[0])
    assert [(user.user_id, user.num_pairs, user.moved, user.status) for user in result.users] == [
        ("eve", 0, False, NOT_ENOUGH),
        ("7", 0, False, NOT_ENOUGH),
    ]


def test_a_user_who_stays_with_the_generic_prompt_has_it_bit_for_bit():
    model, reference = make_personalized("cluster")
    result = model.add_users(make_pairs(2, 1), make_tokenizer(), reference, settings=SETTINGS, user_ids=["eve"])
    stays = [5 + number for number, user in enumerate(result.users) if not user.moved]
    assert stays
    with torch.no_grad():
        prompts = model.user_model(torch.tensor([0, *stays]))
    assert all(torch.equal(prompt, prompts[0]) for prompt in prompts)


@pytest.mark.parametrize("num_known", [0, 1])
def test_without_known_users_rows_are_free_offsets_and_it_is_told(num_known, caplog):
    model, reference = make_personalized(num_users=num_known)
    with caplog.at_level(logging.WARNING, "trl_personal"):
        result = model.add_users(make_pairs(2, 8), make_tokenizer(), reference, settings=SETTINGS)
    assert "nothing tells in which directions users differ" in caplog.text
    assert not result.knows_spread
    assert len(model.user_vocab) == num_known + 2


def test_the_order_and_the_batch_of_pairs_change_nothing():
    pairs, rows = make_pairs(3, 4), []
    for order, batch_size in ((range(12), 16), (range(11, -1, -1), 5)):
        model, reference = make_personalized()
        dataset = pairs.select(order)
        model.add_users(dataset, make_tokenizer(), reference, settings=SETTINGS, batch_size=batch_size)
        found = model.user_model.get_rows(model.user_vocab.encode(["new-0", "new-1", "new-2"]))
        rows.append(found["user_offsets"])
    torch.testing.assert_close(rows[0], rows[1], rtol=0.1, atol=2e-2)


def test_an_update_moves_the_users_with_pairs_alone():
    model, reference = make_personalized()
    before = state_of(model)
    pairs = judged_by(model, reference, 1, "known-2", generic=3)
    result = model.update_users(pairs, make_tokenizer(), reference, settings=SETTINGS)
    assert [user.user_id for user in result.users] == ["known-2"]
    assert result.users[0].moved
    after = model.state_dict()
    assert all(torch.equal(after[n], before[n]) for n in before if n != "user_model.user_offsets.weight")
    table, was = after["user_model.user_offsets.weight"], before["user_model.user_offsets.weight"]
    assert not torch.equal(table[3], was[3])
    table[3] = was[3]
    assert torch.equal(table, was)


def test_settings_are_those_of_the_training(make_trainer, model_dirs, preferences, tmp_path, caplog):
    trainer = make_trainer(beta=0.7, max_length=20)
    trainer.save_model(str(tmp_path / "out"))
    loaded = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "out")
    for model in (loaded, trainer.model):
        found = settings_of(model, None)
        assert (found["beta"], found["max_length"], found["user_id_column"]) == (0.7, 20, "user_id")
    assert settings_of(loaded, {"max_length": 9})["max_length"] == 9
    plain, _ = make_personalized()
    with caplog.at_level(logging.WARNING, "trl_personal"):
        assert settings_of(plain, None) == {}
    assert "TRL's defaults" in caplog.text


def test_users_of_a_trainer_join_too(make_trainer, model_dirs):
    trainer = make_trainer()
    trainer.train()
    model = trainer.model
    result = model.add_users(make_pairs(2, 4), make_tokenizer(), model_dirs["gptj"])
    assert len(result.users) == 2
    assert list(model.user_vocab) == ["ann", "bo", "new-0", "new-1"]


def test_profiles_go_into_the_prompts_of_new_users(make_trainer, preferences, tmp_path):
    with_profiles = preferences.add_column("profile", ["likes dogs", "likes cats"] * 4)
    trainer = make_trainer(user_profile_column="profile", trainer_kwargs={"train_dataset": with_profiles})
    trainer.save_model(str(tmp_path / "out"))
    model = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "out")
    pairs = make_pairs(1, 4).add_column("profile", ["likes dogs"] * 4)
    found = []
    for dataset in (pairs, pairs.map(lambda row: {"profile": "the end yes"})):
        settings = {**json.loads((tmp_path / "out" / "training_settings.json").read_text())["settings"]}
        with row_margins(model, make_tokenizer(), dataset, settings, make_model()) as margins:
            found.append(margins.at(margins.flat_rows([0]), torch.zeros(4, dtype=torch.long), gradients=False)[0])
    assert (found[0] - found[1]).abs().min() > 1e-4
    with pytest.raises(ValueError, match="has no `profile` column"):
        model.add_users(make_pairs(1, 4), make_tokenizer(), make_model())


# --- What is refused


def test_what_cannot_join_is_refused_before_anything_changes():
    model, reference = make_personalized()
    before, tokenizer = state_of(model), make_tokenizer()
    with pytest.raises(ValueError, match="1 of the 1 users are in the model already"):
        model.add_users(make_pairs(1, 2, users=["known-1"]), tokenizer, reference, settings=SETTINGS)
    with pytest.raises(ValueError, match="1 of the 1 users are not in the model"):
        model.update_users(make_pairs(1, 2), tokenizer, reference, settings=SETTINGS)
    with pytest.raises(ValueError, match="nobody to join"):
        model.add_users(None, tokenizer, reference, settings=SETTINGS)
    with pytest.raises(ValueError, match="Give it as `ref_model`"):
        model.add_users(make_pairs(), tokenizer, settings=SETTINGS)
    with pytest.raises(ValueError, match="has no `user_id` column"):
        model.add_users(make_pairs().remove_columns("user_id"), tokenizer, reference, settings=SETTINGS)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert list(model.user_vocab) == [f"known-{i}" for i in range(4)]


def test_ids_stay_out_of_the_log(caplog):
    model, reference = make_personalized()
    with caplog.at_level(logging.INFO):
        model.add_users(make_pairs(1, 3, users=["a-very-secret-id"]), make_tokenizer(), reference, settings=SETTINGS)
    assert "secret" not in caplog.text
    assert "1 users have joined the 4" in caplog.text


# --- Results and folders


def test_results_are_json_and_a_table(capsys):
    model, reference = make_personalized()
    result = model.add_users(make_pairs(2, 4), make_tokenizer(), reference, settings=SETTINGS)
    found = json.loads(json.dumps(result.to_dict()))
    assert found["users"][0]["num_pairs"] == 4
    assert 0 <= found["users"][0]["accuracy"]["low"] <= found["users"][0]["accuracy"]["high"] <= 1
    print_whole(fits_table(result.users, "generic prompt"))
    shown = capsys.readouterr().out
    assert "new-0" in shown
    assert "with the generic prompt" in shown


@pytest.mark.parametrize("kind", ["individual", "cluster"])
@pytest.mark.parametrize("lora", [False, True], ids=FORMS)
def test_a_folder_changes_in_its_users_only_and_back(kind, lora, make_trainer, model_dirs, tmp_path):
    trainer = make_trainer(lora=lora, user_model_kind=kind, num_clusters=2)
    trainer.train()
    folder = tmp_path / "out"
    trainer.save_model(str(folder))
    before = hashes(folder)
    model = AutoPersonalizedModelForCausalLM.from_pretrained(folder)
    model.add_users(make_pairs(2, 4), make_tokenizer(), None if lora else model_dirs["gptj"])
    write_users(model, folder)
    after = hashes(folder)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {
        f"user_model/{name}"
        for name in ("users.json", "joined_users.json", "user_model.safetensors", "user_model_config.json")
    }
    again = AutoPersonalizedModelForCausalLM.from_pretrained(folder)
    assert list(get_base_model(again).user_vocab) == ["ann", "bo", "new-0", "new-1"]
    for name, rows in get_base_model(again).user_model.get_rows(range(5)).items():
        assert torch.equal(rows, get_base_model(model).user_model.get_rows(range(5))[name])
    get_base_model(again).remove_users(["new-0", "new-1"])
    write_users(again, folder)
    assert hashes(folder) == before


def test_copies_of_a_model_join_apart():
    model, reference = make_personalized()
    other = copy.deepcopy(model)
    other.add_users(make_pairs(1, 2), make_tokenizer(), reference, settings=SETTINGS)
    assert (len(model.user_vocab), len(other.user_vocab)) == (4, 5)


# --- On the command line


@pytest.fixture
def folder(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    return tmp_path / "out"


def test_users_join_and_are_refined_on_the_command_line(folder, model_dirs, tmp_path, capsys):
    make_pairs(2, 4).to_json(tmp_path / "new.jsonl")
    common = ["--dataset_name", str(tmp_path / "new.jsonl"), "--ref_model", model_dirs["gptj"]]
    before = hashes(folder)
    arguments = make_users_add_parser().parse_args([str(folder), *common, "--user_ids", "eve", "--format", "json"])
    run_users_add(arguments)
    found = json.loads(capsys.readouterr().out)
    assert [(user["user_id"], user["num_pairs"]) for user in found["users"]] == [
        ("eve", 0),
        ("new-0", 4),
        ("new-1", 4),
    ]
    assert list(UserVocab.from_pretrained(folder / "user_model")) == ["ann", "bo", "eve", "new-0", "new-1"]
    changed = {name for name, value in hashes(folder).items() if before.get(name) != value}
    assert {Path(name).parts[0] for name in changed} == {"user_model"}
    arguments = make_users_update_parser().parse_args([str(folder), *common, "--output", str(tmp_path / "fit.json")])
    run_users_update(arguments)
    shown = capsys.readouterr()
    assert "with the present prompt" in shown.out
    assert "user_model is written" in shown.err
    assert len(json.loads((tmp_path / "fit.json").read_text())["users"]) == 2
    assert len(UserVocab.from_pretrained(folder / "user_model")) == 5


def test_what_the_command_line_refuses_leaves_the_folder_as_it_is(folder, tmp_path):
    make_pairs(1, 2).to_json(tmp_path / "new.jsonl")
    before = hashes(folder)
    with pytest.raises(ValueError, match="`ref_model`"):
        run_users_add(make_users_add_parser().parse_args([str(folder), "--dataset_name", str(tmp_path / "new.jsonl")]))
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        run_users(parse_users(["add", str(tmp_path / "nowhere"), "--user_ids", "eve"]))
    with only_run_in(folder), pytest.raises(RuntimeError, match="Another run is training in"):
        run_users_add(make_users_add_parser().parse_args([str(folder), "--user_ids", "eve"]))
    assert hashes(folder) == before


# --- Training of rows alone


@pytest.mark.parametrize("kind", KINDS)
def test_rows_alone_are_trained_where_the_rest_is_frozen(kind, make_trainer, preferences, folder, tmp_path):
    start = make_trainer(user_model_kind=kind, num_clusters=2)
    start.save_model(str(tmp_path / "start"))
    rows = preferences.map(lambda row: {"user_id": "bo" if row["user_id"] == "bo" else None})
    trainer = make_trainer(
        user_model_kind=kind,
        freeze="shared",
        per_device_train_batch_size=2,
        trainer_kwargs={"model": str(tmp_path / "start"), "train_dataset": rows},
    )
    before = state_of(trainer.model)
    trainer.train()
    after = trainer.model.state_dict()
    tables = {f"user_model.{name}.weight" for name in trainer.user_model.row_tables()}
    for name, tensor in before.items():
        moved = (after[name] != tensor).flatten(1).any(1).nonzero().flatten().tolist() if name in tables else None
        assert moved == [2] if name in tables else torch.equal(after[name], tensor), name


def test_freezing_needs_users_who_were_trained(make_trainer):
    with pytest.raises(ValueError, match="`model` has none"):
        make_trainer(freeze="shared")


def test_what_a_training_that_goes_on_moves_is_told(make_trainer, folder, caplog):
    with caplog.at_level(logging.INFO, "trl_personal"):
        make_trainer(trainer_kwargs={"model": str(folder)})
    assert "all of their soft prompts" in caplog.text


def test_functions_are_the_methods():
    model, reference = make_personalized()
    add_users(model, make_pairs(1, 3), make_tokenizer(), reference, settings=SETTINGS)
    update_users(model, make_pairs(1, 3), make_tokenizer(), reference, settings=SETTINGS)
    assert len(model.user_vocab) == 5
