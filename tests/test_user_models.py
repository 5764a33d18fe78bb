"""Every user model, built in or the example's, passes the same tests."""

import json

import pytest
import torch
from conftest import KINDS, make_model
from safetensors.torch import load_file, save_file

from trl_personal import (
    LowRankUserModel,
    LowRankUserModelConfig,
    UserModel,
    UserVocab,
    attach_user_model,
    register_user_model,
)
from trl_personal.user_models import get_user_model_class
from trl_personal.user_models.initialization import soft_prompt_drawer
from trl_personal.user_models.movement import measure_movement
from trl_personal.users import GENERIC_USER_INDEX


def make(kind, num_users=3, seed=0, **options):
    torch.manual_seed(seed)
    user_model_class = get_user_model_class(kind)
    sizes = {"num_users": num_users, "num_virtual_tokens": 2, "token_dim": 8} | options
    return user_model_class(user_model_class.config_class(**sizes))


@pytest.fixture(params=KINDS)
def user_model(request):
    """A user model that has been trained a little: no row of a known user is at its start."""
    user_model = make(request.param)
    optimizer = torch.optim.SGD(user_model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        target = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(1))
        (user_model(torch.tensor([1, 2, 3, 0])) - target).square().sum().backward()
        optimizer.step()
    user_model.zero_grad()
    return user_model


def test_returns_one_soft_prompt_per_user(user_model):
    assert user_model(torch.tensor([1, 2, 3, 0])).shape == (4, 2, 8)
    assert user_model(torch.tensor([1])).dtype == torch.float32


def test_same_user_gets_the_same_soft_prompt_anywhere_in_the_batch(user_model):
    first, other, again = user_model(torch.tensor([2, 1, 2]))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_every_user_starts_as_the_generic_user():
    for kind in KINDS:
        soft_prompts = make(kind)(torch.arange(4))
        torch.testing.assert_close(soft_prompts, soft_prompts[:1].expand(4, -1, -1))


def test_a_user_without_rows_never_moves(user_model):
    (table,) = [module for module in user_model.modules() if isinstance(module, torch.nn.Embedding)]
    before = table.weight.clone()
    optimizer = torch.optim.AdamW(
        [{"params": user_model.parameters(), "weight_decay": 0.0}], lr=0.1
    )  # as in the trainer
    user_model(torch.tensor([1, 3])).square().sum().backward()
    optimizer.step()
    assert torch.equal(table.weight[2], before[2])
    assert not torch.equal(table.weight[1], before[1])


def test_save_and_load_returns_equal_soft_prompts(user_model, tmp_path):
    user_model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "user_model.safetensors",
        "user_model_config.json",
    }
    reloaded = UserModel.from_pretrained(tmp_path)
    assert type(reloaded) is type(user_model)
    assert torch.equal(reloaded(torch.arange(4)), user_model(torch.arange(4)))


def test_resizing_keeps_known_users_and_starts_new_ones_as_the_generic_user(user_model):
    resized = user_model.resize(5)
    soft_prompts = resized(torch.arange(6))
    assert torch.equal(soft_prompts[:4], user_model(torch.arange(4)))
    torch.testing.assert_close(soft_prompts[4:], soft_prompts[:1].expand(2, -1, -1))
    with pytest.raises(ValueError, match="Cannot shrink a user model of 3 users to 2"):
        user_model.resize(2)


def test_individual_is_generic_prompt_plus_offset():
    user_model = make("individual")
    user_model.user_offsets.weight.data[2] = torch.arange(16.0)
    expected = user_model.generic_prompt + torch.arange(16.0).view(2, 8)
    torch.testing.assert_close(user_model(torch.tensor([2]))[0], expected)


def test_generic_user_has_no_offset_to_train():
    user_model = make("individual")
    user_model(torch.tensor([0, 0, 1])).sum().backward()
    assert user_model.user_offsets.weight.grad[0].abs().sum() == 0
    assert user_model.user_offsets.weight.grad[1].abs().sum() > 0
    assert torch.equal(user_model.generic_prompt.grad, torch.full((2, 8), 3.0))


def test_cluster_is_softmax_mixture():
    user_model = make("cluster", num_clusters=2)
    user_model.user_logits.weight.data[1] = torch.tensor([0.0, 1.0])
    weight = torch.tensor(1.0).exp() / (1 + torch.tensor(1.0).exp())
    expected = (1 - weight) * user_model.cluster_prompts[0] + weight * user_model.cluster_prompts[1]
    torch.testing.assert_close(user_model(torch.tensor([1]))[0], expected)


def test_vocabulary_rows_are_drawn_by_seed_and_with_replacement():
    embedding = torch.nn.Embedding(5, 8)
    draw = soft_prompt_drawer(embedding, 5, num_virtual_tokens=2, seed=3)
    prompts = draw(10)  # 20 rows from a vocabulary of 5
    assert prompts.shape == (10, 2, 8)
    assert all((embedding.weight == row).all(dim=1).any() for row in prompts.flatten(0, 1))
    assert torch.equal(prompts, soft_prompt_drawer(embedding, 5, num_virtual_tokens=2, seed=3)(10))
    assert not torch.equal(prompts, soft_prompt_drawer(embedding, 5, num_virtual_tokens=2, seed=4)(10))


def test_text_is_repeated_to_the_length_and_cut():
    embedding = torch.nn.Embedding(5, 8)
    draw = soft_prompt_drawer(embedding, 5, 3, soft_prompt_init="text", text_ids=[4, 1])
    assert torch.equal(draw(2), embedding(torch.tensor([[4, 1, 4]] * 2)))


def test_random_prompts_have_the_scale_of_the_vocabulary():
    embedding = torch.nn.Embedding(50, 64)
    embedding.weight.data.mul_(0.1).add_(0.5)
    prompts = soft_prompt_drawer(embedding, 50, 20, soft_prompt_init="random")(20)
    assert abs(prompts.std() / embedding.weight.std() - 1) < 0.05
    assert abs(prompts.mean() - 0.5) < 0.01


def test_noise_of_random_prompts_follows_the_seed():
    embedding = torch.nn.Embedding(50, 8)
    one, again, other = (soft_prompt_drawer(embedding, 50, 2, "random", seed=seed)(3) for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_prompts_start_from_embeddings_as_the_model_scales_them():
    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return 10 * super().forward(ids)

    embedding = Scaled(5, 8)
    prompt = soft_prompt_drawer(embedding, 5, 2, "text", text_ids=[4, 1])(1)[0]
    assert torch.equal(prompt, 10 * embedding.weight[[4, 1]])


def test_offsets_of_low_rank_start_on_the_scale_of_the_embeddings():
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(50, 64)
    user_model = LowRankUserModel(LowRankUserModelConfig(2, 10, 64, user_rank=8))
    user_model.initialize(soft_prompt_drawer(embedding, 50, 10))
    assert user_model.shared_basis.std().item() == pytest.approx(user_model.generic_prompt.std().item(), rel=1e-4)
    assert user_model.shared_basis.std().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("name", ["num_virtual_tokens", "num_clusters", "num_users"])
def test_sizes_must_be_positive_integers(name):
    for value in (-1, 1.5):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least"):
            make("cluster", **{name: value})


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="'cluster' is already registered: ClusterUserModel"):

        @register_user_model("cluster")
        class Mine(UserModel):
            def forward(self, user_indices):
                return user_indices


# --- Files that cannot be trusted ---------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    make("individual").save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **values):
    path = folder / "user_model_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_unknown_kind_is_named_with_the_known_ones(saved):
    edit_config(saved, kind="mystery")
    with pytest.raises(ValueError, match=r"no user model of kind 'mystery'.*'cluster', 'individual'"):
        UserModel.from_pretrained(saved)


def test_newer_format_asks_for_an_upgrade(saved):
    edit_config(saved, format_version=99)
    with pytest.raises(ValueError, match="format version 99.*Upgrade"):
        UserModel.from_pretrained(saved)


def test_foreign_config_is_refused(saved):
    (saved / "user_model_config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(ValueError, match="not written by trl_personal"):
        UserModel.from_pretrained(saved)


def test_missing_entry_is_named(saved):
    config = json.loads((saved / "user_model_config.json").read_text())
    del config["token_dim"]
    (saved / "user_model_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks \['token_dim'\]"):
        UserModel.from_pretrained(saved)


@pytest.mark.parametrize("name", ["user_model_config.json", "user_model.safetensors"])
def test_cut_off_and_missing_files_are_refused(saved, name):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{name} cannot be read.*cut off"):
        UserModel.from_pretrained(saved)
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"There is no {name}"):
        UserModel.from_pretrained(saved)


def test_weights_of_another_shape_or_dtype_are_refused(saved):
    edit_config(saved, num_users=4)
    with pytest.raises(ValueError, match=r"does not fit.*user_offsets.weight \(5, 16\).*found.*\(4, 16\)"):
        UserModel.from_pretrained(saved)
    edit_config(saved, num_users=3)
    weights = load_file(saved / "user_model.safetensors")
    save_file({name: tensor.long() for name, tensor in weights.items()}, saved / "user_model.safetensors")
    with pytest.raises(ValueError, match="does not fit.*torch.float32.*found.*I64"):
        UserModel.from_pretrained(saved)


# --- Casts ------------------------------------------------------------------------------------------------------------

CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to dtype": lambda model: model.to(torch.float16),
    "to device and dtype": lambda model: model.to("cpu", torch.bfloat16),
    "to another tensor": lambda model: model.to(torch.ones(1, dtype=torch.float16)),
    "double": lambda model: model.double(),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_is_of_the_language_model_only(kind, cast, tmp_path):
    model = make_model("llama")
    user_model = make(kind, token_dim=32)
    for parameter in user_model.parameters():
        torch.nn.init.normal_(parameter)
    for table in user_model.row_tables().values():
        if table.padding_idx is not None:
            table.weight.data[table.padding_idx] = 0
    attach_user_model(model, user_model, UserVocab(["ann", "bo", "cy"]))
    before = {name: value.clone() for name, value in user_model.state_dict().items()}
    model = CASTS[cast](model)
    assert model.dtype != torch.float32
    for name, value in model.user_model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
    written = model.generate(torch.tensor([[1, 5, 6]]), user_ids="bo", max_new_tokens=3, do_sample=False)
    assert written.shape == (1, 6)
    model.save_pretrained(tmp_path)
    saved = UserModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in saved.state_dict().items())


def test_moves_are_made_and_a_half_table_becomes_float32():
    user_model = make("individual")
    assert next(user_model.to("meta").parameters()).is_meta
    user_model = make("individual")
    for parameter in user_model.parameters():
        parameter.data = parameter.data.half()
    assert {parameter.dtype for parameter in user_model.float().parameters()} == {torch.float32}


def test_movement_is_measured_in_units_of_the_token_embeddings():
    """By hand: users of two virtual tokens of width 2 at +0.3 and +0.1 of the generic prompt, embeddings of deviation 0.1."""
    user_model = make("individual", num_users=2, num_virtual_tokens=2, token_dim=2)
    assert measure_movement(user_model, 0.1).to_dict() == {"moved": 0.0, "differ": 0.0}
    user_model.user_offsets.weight.data[1:] = torch.tensor([[0.3], [0.1]])
    movement = measure_movement(user_model, 0.1)
    assert movement.to_dict() == pytest.approx({"moved": 3.0, "differ": 1.0}, abs=1e-5)
    assert movement.warning() is None
    user_model.user_offsets.weight.data[1:] = 0.3
    assert measure_movement(user_model, 0.1).to_dict() == pytest.approx({"moved": 3.0, "differ": 0.0}, abs=1e-5)
    assert "hardly differ" in measure_movement(user_model, 0.1).warning()
    assert "hardly moved" in measure_movement(user_model, 100.0).warning()


def test_movement_of_many_users_is_that_of_a_thousand_of_them():
    user_model = make("low_rank", num_users=2_500, user_rank=1)
    user_model.user_factors.weight.data[1::3] = 1.0  # those that are looked at: every third
    expected = user_model.shared_basis[0].pow(2).mean().sqrt().item()
    assert measure_movement(user_model, 1.0).moved == pytest.approx(expected, abs=1e-5)
    assert measure_movement(make("cluster", num_users=0), 1.0) is None


def test_clusters_from_one_text_are_apart_and_near_it():
    """Equal clusters would get equal gradients, and every user would stay the generic one."""
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(50, 64)
    user_model = make("cluster", num_virtual_tokens=10, token_dim=64, num_clusters=3)
    user_model.initialize(soft_prompt_drawer(embedding, 50, 10, "text", text_ids=[4, 1, 7]))
    text = embedding(torch.tensor([4, 1, 7] * 4)[:10])
    offsets = user_model.cluster_prompts - text
    assert offsets.std().item() == pytest.approx(0.1 * text.std().item(), rel=0.1)
    assert (offsets[0] - offsets[1]).abs().max() > 0


@pytest.mark.parametrize("kind", ["individual", "low_rank"])
def test_the_generic_user_has_no_row_in_a_file(tmp_path, kind):
    """Whatever stands there is written as zeros; a file that holds another row is of another kind, or damaged."""
    user_model = make(kind)
    ((name, table),) = user_model.row_tables().items()
    table.weight.data[GENERIC_USER_INDEX] = 1.0
    user_model.save_pretrained(tmp_path)
    path = tmp_path / "user_model.safetensors"
    saved = load_file(path)
    assert not saved[f"{name}.weight"][GENERIC_USER_INDEX].any()
    assert not UserModel.from_pretrained(tmp_path).get_submodule(name).weight[GENERIC_USER_INDEX].any()
    saved[f"{name}.weight"][GENERIC_USER_INDEX] = 1.0
    save_file(saved, path)
    config = json.loads((tmp_path / "user_model_config.json").read_text())
    del config["user_model_files"]  # as in folders of the first format, which have no fingerprints
    (tmp_path / "user_model_config.json").write_text(json.dumps(config | {"format_version": 1}))
    with pytest.raises(ValueError, match=f"Row 0 of `{name}.weight` in .*user_model.safetensors is not zero"):
        UserModel.from_pretrained(tmp_path)
