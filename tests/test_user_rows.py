"""What belongs to one user in a user model: read it, write it, keep it. Every kind, built in or one's own, passes these."""

import copy

import numpy as np
import pytest
import torch
from conftest import KINDS
from torch import nn

from trl_personal import UserModel, UserModelConfig
from trl_personal.user_models import get_user_model_class


NUM_USERS = 4
TABLES = {
    "individual": {"user_offsets"},
    "cluster": {"user_logits"},
    "low_rank": {"user_factors"},
    "point": {"user_factors"},
    "two tables": {"strength", "inner.direction"},
    "misleading": {"user_offsets"},
}


class TwoTablesUserModel(UserModel):
    """How strong a user's own prompt is, and which it is; the second is a table of a submodule."""

    def __init__(self, config):
        super().__init__(config)
        self.generic_prompt = nn.Parameter(torch.randn(config.num_virtual_tokens, config.token_dim))
        self.strength = nn.Embedding(config.num_users + 1, 1)
        self.inner = nn.ModuleDict({"direction": nn.Embedding(config.num_users + 1, config.token_dim)})
        self.register_buffer("scale", torch.ones(3), persistent=False)

    def forward(self, user_indices):
        own = self.strength(user_indices) * self.inner["direction"](user_indices)
        return self.generic_prompt + own[:, None]


class MisleadingUserModel(UserModel):
    """An `nn.Embedding` of all users has as many rows as there are users, with the generic one."""

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(NUM_USERS + 1, config.num_virtual_tokens * config.token_dim)
        self.user_offsets = nn.Embedding(config.num_users + 1, config.num_virtual_tokens * config.token_dim)

    def forward(self, user_indices):
        prompts = self.words.weight.sum(0) + self.user_offsets(user_indices)
        return prompts.view(-1, self.config.num_virtual_tokens, self.config.token_dim)


OWN = {"two tables": TwoTablesUserModel, "misleading": MisleadingUserModel}


def make(kind, num_users=NUM_USERS, seed=0):
    torch.manual_seed(seed)
    user_model_class = OWN.get(kind) or get_user_model_class(kind)
    config = user_model_class.config_class(num_users=num_users, num_virtual_tokens=2, token_dim=8)
    user_model = user_model_class(config)
    for parameter in user_model.parameters():
        parameter.data.normal_()
    return user_model


@pytest.fixture(params=sorted([*KINDS, *OWN]))
def kind(request):
    return request.param


@pytest.fixture
def user_model(kind):
    return make(kind)


def shared(user_model):
    tables = {f"{name}.weight" for name in user_model.row_tables()}
    return {name: p for name, p in user_model.named_parameters() if name not in tables}


def test_tables_are_those_that_grow_with_users(user_model, kind):
    tables = user_model.row_tables()
    assert set(tables) == TABLES[kind]
    assert all(user_model.get_submodule(name) is table for name, table in tables.items())


def test_rows_are_read_in_the_order_asked_for_as_copies(user_model):
    rows = user_model.get_rows([3, 0, 3, 1])
    for name, table in user_model.row_tables().items():
        assert rows[name].dtype == torch.float32
        assert not rows[name].requires_grad
        assert torch.equal(rows[name], table.weight.detach()[[3, 0, 3, 1]])
        rows[name].zero_()
        assert table.weight[1].abs().sum() > 0
    assert {values.shape[0] for values in user_model.get_rows([]).values()} == {0}


def test_rows_of_half_precision_are_read_in_float32(kind):
    user_model = make(kind).to(torch.bfloat16)
    for name, values in user_model.get_rows(torch.tensor([2])).items():
        assert values.dtype == torch.float32
        assert torch.equal(values[0], user_model.row_tables()[name].weight[2].float())


def test_a_user_moves_to_another_model(kind):
    home, away = make(kind), make(kind, num_users=6)
    away.load_state_dict(shared(home), strict=False)
    others = torch.tensor([0, 1, 3, 4, 6])
    before = away(others)
    away.set_rows(np.array([5, 2]), home.get_rows([1, 3]))
    assert torch.equal(away(torch.tensor([5, 2])), home(torch.tensor([1, 3])))
    assert torch.equal(away(others), before)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in away.parameters())


def test_rows_that_do_not_fit_are_refused_and_nothing_is_written(user_model):
    state = copy.deepcopy(user_model.state_dict())
    rows = user_model.get_rows([1, 2])
    name = sorted(rows)[-1]
    for indices, wrong, message in [
        ([0, 1], rows, r"integers from 1 to 4, got \[0\]"),
        ([1, 5], rows, r"integers from 1 to 4, got \[5\]"),
        ([1, -1], rows, r"got \[-1\]"),
        ([1, 2.0], rows, r"got \[2.0\]"),
        ([1, True], rows, r"got \[True\]"),
        (["ann", "bo"], rows, r"got \['ann', 'bo'\].*`UserVocab.encode`"),
        ([3, 3], rows, r"listed once, got \[3\]"),
        ([1, 2], rows | {"mood": torch.zeros(2, 1)}, "got rows of .*'mood'"),
        ([1, 2], {}, r"has rows in .*, got rows of \[\]"),
        ([1], rows, rf"Rows of `{sorted(rows)[0]}` must have shape \(1, \d+\), got \(2, \d+\)"),
        ([1, 2], rows | {name: rows[name][:, :0]}, rf"Rows of `{name}` must have shape"),
        ([1, 2], rows | {name: rows[name] / 0}, rf"Rows of `{name}` must be finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            user_model.set_rows(indices, wrong)
    with pytest.raises(ValueError, match=r"integers from 0 to 4, got \[5\]"):
        user_model.get_rows([5])
    assert all(torch.equal(values, state[key]) for key, values in user_model.state_dict().items())


def test_kept_users_are_who_they_were(user_model):
    kept = user_model.keep_rows([3, 1])
    assert type(kept) is type(user_model)
    assert kept.config.num_users == 2
    assert torch.equal(kept(torch.arange(3)), user_model(torch.tensor([0, 3, 1])))
    assert all(torch.equal(p, dict(user_model.named_parameters())[name]) for name, p in shared(kept).items())
    assert {table.weight.shape[0] for table in kept.row_tables().values()} == {3}
    kept.requires_grad_(False)
    for parameter in kept.parameters():
        parameter.zero_()
    assert user_model(torch.tensor([3])).abs().sum() > 0  # nothing is shared with the original


def test_all_users_or_none_can_be_kept(user_model):
    other_order = user_model.keep_rows([4, 3, 2, 1])
    assert torch.equal(other_order(torch.arange(5)), user_model(torch.tensor([0, 4, 3, 2, 1])))
    nobody = user_model.keep_rows([])
    assert nobody.config.num_users == 0
    assert torch.equal(nobody(torch.tensor([0])), user_model(torch.tensor([0])))


@pytest.mark.parametrize(
    ("indices", "message"), [([0], r"got \[0\]"), ([5], r"got \[5\]"), ([2, 1, 2], "listed once")]
)
def test_users_that_cannot_be_kept_are_refused(user_model, indices, message):
    with pytest.raises(ValueError, match=message):
        user_model.keep_rows(indices)


@pytest.mark.parametrize("change", [lambda m: m.keep_rows([2, 4]), lambda m: m.resize(6)], ids=["keep", "resize"])
def test_settings_of_the_caller_stay(kind, change):
    user_model = make(kind).eval()
    frozen = sorted(name for name, _ in user_model.named_parameters())[0]
    dict(user_model.named_parameters())[frozen].requires_grad_(False)
    state = torch.get_rng_state()
    user_model.row_tables()
    assert torch.equal(torch.get_rng_state(), state)
    changed = change(user_model)
    assert {parameter.dtype for parameter in changed.parameters()} == {torch.float32}
    assert [name for name, p in changed.named_parameters() if not p.requires_grad] == [frozen]
    assert not any(module.training for module in changed.modules())
    next(iter(user_model.row_tables().values())).train()
    assert [module.training for module in change(user_model).modules()].count(True) == 1


def test_a_user_model_on_another_device_stays_there(kind):
    user_model = make(kind).to("meta")
    assert {parameter.device.type for parameter in user_model.keep_rows([2]).parameters()} == {"meta"}


def test_users_of_clusters_that_are_new_start_as_the_generic_user():
    resized = make("cluster").resize(6)
    assert torch.equal(resized(torch.tensor([5, 6])), resized(torch.tensor([0, 0])))


@pytest.mark.parametrize("persistent", [True, False])
def test_rows_outside_of_an_embedding_are_kept_but_not_read(persistent):
    class Described(MisleadingUserModel):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("texts", torch.zeros(config.num_users + 1, 3), persistent)

    torch.manual_seed(0)
    user_model = Described(UserModelConfig(NUM_USERS, 2, 8))
    user_model.texts.normal_()
    assert torch.equal(user_model.keep_rows([4, 2]).texts, user_model.texts[[0, 4, 2]])
    assert torch.equal(user_model.resize(6).texts[:5], user_model.texts)
    with pytest.raises(ValueError, match="`texts` of Described has a row per user.*`nn.Embedding`"):
        user_model.get_rows([1])


def test_what_grows_otherwise_than_by_rows_is_named():
    class Transposed(MisleadingUserModel):
        def __init__(self, config):
            super().__init__(config)
            self.columns = nn.Parameter(torch.zeros(3, config.num_users + 1))

    user_model = Transposed(UserModelConfig(NUM_USERS, 2, 8))
    for use in (user_model.row_tables, lambda: user_model.resize(6), lambda: user_model.keep_rows([1])):
        with pytest.raises(
            ValueError, match="`columns` of Transposed grows with the number of users, but not by a row"
        ):
            use()
