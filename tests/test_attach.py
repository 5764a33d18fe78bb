"""Attaching and detaching change the class of one object, and leave other changes of it alone."""

import pickle

import pytest
import torch
import torch.distributed as dist
from conftest import LORA_TARGETS, make_model
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FSDPModule, fully_shard

from trl_personal import IndividualUserModel, UserModelConfig, UserVocab, attach_user_model, detach_user_model
from trl_personal.models.calls import OwnCalls
from trl_personal.models.mixins import add_mixin, remove_mixin
from trl_personal.models.saving import is_personalized
from trl_personal.training.prefix_sharing import PrefixSharing


IDS = torch.tensor([[1, 5, 6, 7]])
ANN = torch.tensor([1])


def attach(model):
    torch.manual_seed(5)
    user_model = IndividualUserModel(UserModelConfig(2, 3, 32))
    for parameter in user_model.parameters():
        parameter.data.normal_()
    attach_user_model(model, user_model, UserVocab(["ann", "bo"]))


class Sharded:
    """As torch's `FSDPModule`: put in front of the class of an object."""

    def reshard(self):
        return "resharded"


def shard(model):
    """As `fully_shard` does it."""
    cls = model.__class__
    model.__class__ = type(f"FSDP{cls.__name__}", (Sharded, cls), {"__deepcopy__": None})


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("order", ["never", "before", "after"])
def test_detaching_leaves_the_class_that_another_put_there(order, lora):
    model = make_model("llama")
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=LORA_TARGETS))
    causal_lm = model.get_base_model() if lora else model
    expected = model(IDS).logits
    classes = type(model), type(causal_lm)
    if order == "before":
        shard(causal_lm)
        classes = type(model), type(causal_lm)
    attach(model)
    if order == "after":
        shard(causal_lm)
    assert is_personalized(model)
    assert not torch.equal(model(IDS, user_indices=ANN).logits, expected)
    detach_user_model(model)
    assert not is_personalized(model)
    assert not isinstance(model, OwnCalls)
    assert isinstance(causal_lm, Sharded) == (order != "never")
    assert torch.equal(model(IDS).logits, expected)
    if order != "after":
        assert (type(model), type(causal_lm)) == classes
    else:
        assert causal_lm.reshard() == "resharded"
        assert vars(type(causal_lm))["__deepcopy__"] is None
        assert type(causal_lm).__bases__ == (Sharded, classes[1])
    attach(model)
    assert is_personalized(model)
    assert not torch.equal(model(IDS, user_indices=ANN).logits, expected)


def test_a_reference_that_shares_prefixes_is_attached_and_detached_too():
    model = make_model("llama")
    plain = type(model)
    PrefixSharing(model)
    attach(model)
    assert isinstance(pickle.loads(pickle.dumps(model)), OwnCalls)
    detach_user_model(model)
    assert not is_personalized(model)
    assert isinstance(model, OwnCalls)  # packed pairs still need it
    remove_mixin(model, OwnCalls)
    assert type(model) is plain


def test_a_mixin_is_taken_off_from_below_another():
    class One:
        pass

    class Other:
        pass

    model = torch.nn.Linear(2, 2)
    for mixin in (One, Other):
        add_mixin(model, mixin)
    remove_mixin(model, One)
    assert type(model).__mro__[1:3] == (Other, torch.nn.Linear)
    remove_mixin(model, One)  # is not there
    remove_mixin(model, Other)
    assert type(model) is torch.nn.Linear


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
def test_detaching_from_a_model_that_torch_has_sharded(order, tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model = make_model("llama")
        expected = model(IDS).logits
        if order == "before":
            fully_shard(model, mesh=mesh)
        attach(model)
        if order == "after":
            fully_shard(model, mesh=mesh)
        rows = model.user_model.get_rows([2])
        model.user_model.set_rows([1], rows)
        assert torch.equal(model.user_model.get_rows([1])["user_offsets"], rows["user_offsets"])
        kept = model.user_model.keep_rows([2])
        assert torch.equal(kept.get_rows([1])["user_offsets"], rows["user_offsets"])
        torch.testing.assert_close(
            model(IDS, user_indices=ANN).logits, model(IDS, user_indices=torch.tensor([2])).logits
        )
        detach_user_model(model)
        assert not is_personalized(model)
        assert isinstance(model, FSDPModule)
        torch.testing.assert_close(model(IDS).logits, expected)
    finally:
        dist.destroy_process_group()
