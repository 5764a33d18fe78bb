"""Calls of one model do not meet: in threads, one inside another, and after one that failed."""

import copy
import pickle
import sys
import threading
import time

import pytest
import torch
from conftest import LORA_TARGETS, make_model
from peft import LoraConfig, get_peft_model
from test_prefix_sharing import PAIRS, USERS, collate, score
from test_prefix_sharing import with_users as with_fused_head
from torch._dynamo.testing import CompileCounter

from trl_personal import IndividualUserModel, UserModelConfig, UserVocab, attach_user_model, detach_user_model
from trl_personal.models.calls import in_call, keep, take
from trl_personal.threads import fastest, fastest_num_threads
from trl_personal.training.prefix_sharing import pack_pairs


BOS = 1
ROWS = [  # equal and unequal numbers of rows and columns
    torch.tensor([[BOS, 5, 6, 7]]),
    torch.tensor([[BOS, 8, 9, 10]]),
    torch.tensor([[5, 6, 7, 8, 9, 10, 11], [BOS, 6, 7, 8, 9, 10, 11]]),
]
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def with_users(model, seed=5):
    torch.manual_seed(seed)
    user_model = IndividualUserModel(UserModelConfig(4, 3, 32))
    for parameter in user_model.parameters():
        parameter.data.normal_()
    attach_user_model(model, user_model, UserVocab(["ann", "bo", "cy", "di"]))
    return model.eval()


@pytest.fixture
def model():
    return with_users(make_model("llama"))


@pytest.fixture
def other_model():
    return with_users(make_model("gptj", seed=3), seed=6)


@pytest.fixture
def switching():
    """Threads take turns often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def users(user, ids):
    return {} if user is None else {"user_indices": torch.full((len(ids),), user)}


@torch.no_grad()
def logits(model, ids, user):
    return model(ids, **users(user, ids)).logits


@torch.no_grad()
def written(model, ids, user):
    return model.generate(ids, attention_mask=torch.ones_like(ids), user_ids=list(model.user_vocab)[user], **GREEDY)


def run_together(*functions):
    """Each in a thread of its own; their results, or the first error."""
    results = [None] * len(functions)

    def run(i, function):
        try:
            results[i] = function()
        except BaseException as error:  # noqa: BLE001
            results[i] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


# --- Threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_threads_get_their_own_answers(lora, switching):
    model = make_model("llama")
    if lora:
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=LORA_TARGETS, init_lora_weights=False)
        model = get_peft_model(model, config)
    model = with_users(model)
    calls = [(logits, ids, user) for ids in ROWS for user in (None, 1, 2, 3)]
    calls += [(written, ids, user) for ids in ROWS for user in (0, 3)]
    expected = [call(model, ids, user) for call, ids, user in calls]

    def work(start):
        found = []
        for i in range(start, start + 2 * len(calls)):
            call, ids, user = calls[i % len(calls)]
            found.append(torch.equal(call(model, ids, user), expected[i % len(calls)]))
        return found

    found = sum(run_together(*(lambda start=start: work(start) for start in (0, 5, 11, 17))), [])
    assert found == [True] * (8 * len(calls))


@pytest.mark.parametrize("share_prefix", ["always", "never"])
def test_one_thread_trains_and_another_generates(share_prefix, make_trainer, switching):
    trainer = make_trainer("llama", share_prefix=share_prefix, learning_rate=0.0, max_steps=8)
    model = trainer.model
    for parameter in trainer.user_model.parameters():
        parameter.data.normal_()
    expected = {(i, user): written(model, ids, user) for i, ids in enumerate(ROWS) for user in (0, 1)}
    losses = [log["loss"] for log in train(make_trainer, share_prefix, trainer.user_model)]
    is_over, wrong, rounds = threading.Event(), [], []

    def answer():
        while not (is_over.is_set() and rounds):
            wrong.extend(key for key, tokens in expected.items() if not written_again(key).equal(tokens))
            rounds.append(1)

    def written_again(key):
        return written(model, ROWS[key[0]], key[1])

    def learn():
        try:
            trainer.train()
        finally:
            is_over.set()

    run_together(answer, learn)
    assert wrong == []
    assert [log["loss"] for log in trainer.state.log_history if "loss" in log] == losses


def train(make_trainer, share_prefix, user_model):
    """The log of the same run, alone."""
    trainer = make_trainer("llama", share_prefix=share_prefix, learning_rate=0.0, max_steps=8)
    trainer.user_model.load_state_dict(user_model.state_dict())
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


# --- A call inside a call ---------------------------------------------------------------------------------------------


class Once:
    """A forward hook that does something in the middle of a call, but not in the calls that it makes itself."""

    def __init__(self, module, function):
        self.function, self.results, self.is_inside = function, [], False
        self.handle = module.register_forward_hook(self)

    def __call__(self, module, args, output):
        if self.is_inside:
            return
        self.is_inside = True
        try:
            self.results.append(self.function())
        finally:
            self.is_inside = False


@pytest.mark.parametrize("inner", range(3), ids=["equal", "other-ids", "unequal"])
@pytest.mark.parametrize("inner_user", [None, 2], ids=["plain", "user"])
@pytest.mark.parametrize("outer_user", [None, 1], ids=["in-plain", "in-user"])
def test_a_layer_calls_the_model_for_another_user(model, outer_user, inner_user, inner):
    outer_ids, inner_ids = ROWS[0], ROWS[inner]
    expected = logits(model, outer_ids, outer_user), logits(model, inner_ids, inner_user)
    once = Once(model.get_decoder().layers[0], lambda: logits(model, inner_ids, inner_user))
    found = logits(model, outer_ids, outer_user)
    assert torch.equal(found, expected[0])
    assert torch.equal(once.results[0], expected[1])


@pytest.mark.parametrize("outer_user", [None, 1], ids=["in-plain", "in-user"])
def test_the_decoder_alone_knows_no_user_also_inside_a_call(model, outer_user):
    decoder = model.get_decoder()
    plain = decoder(ROWS[2]).last_hidden_state
    expected = logits(model, ROWS[2], outer_user)
    once = Once(decoder.layers[0], lambda: decoder(ROWS[2]).last_hidden_state)
    assert torch.equal(logits(model, ROWS[2], outer_user), expected)
    assert torch.equal(once.results[0], plain)


def test_a_failure_of_an_inner_call_leaves_the_outer_one_as_it_is(model):
    expected = logits(model, ROWS[0], 1)

    def fail():
        hook = model.get_decoder().layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            logits(model, ROWS[2], 2)
        hook.remove()
        with pytest.raises(ValueError, match="one user per row"):
            model(ROWS[2], user_indices=torch.tensor([1]))
        hook = model.get_decoder().norm.register_forward_pre_hook(out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            model.get_decoder()(ROWS[2])
        hook.remove()

    Once(model.get_decoder().layers[0], fail)
    assert torch.equal(logits(model, ROWS[0], 1), expected)


def test_two_models_call_each_other(model, other_model):
    expected = logits(model, ROWS[0], 1), logits(other_model, ROWS[2], 2), logits(model, ROWS[1], 3)
    inner = Once(other_model.transformer.h[0], lambda: logits(model, ROWS[1], 3))
    outer = Once(model.get_decoder().layers[0], lambda: logits(other_model, ROWS[2], 2))
    assert torch.equal(logits(model, ROWS[0], 1), expected[0])
    assert torch.equal(outer.results[0], expected[1])
    assert torch.equal(inner.results[0], expected[2])


@pytest.mark.parametrize("inner_user", [None, 2], ids=["plain", "user"])
def test_a_layer_calls_the_model_while_pairs_are_packed(inner_user):
    model = with_fused_head(make_model("llama"))
    batch = collate(PAIRS)
    packed = pack_pairs(**batch)
    expected = score(model, batch, USERS["users"], packed)[0].log_probs, logits(model, ROWS[2], inner_user)
    plain = model.get_decoder()(ROWS[2]).last_hidden_state
    once = Once(
        model.get_decoder().layers[0],
        lambda: (logits(model, ROWS[2], inner_user), model.get_decoder()(ROWS[2]).last_hidden_state),
    )
    assert torch.equal(score(model, batch, USERS["users"], packed)[0].log_probs, expected[0])
    assert torch.equal(once.results[0][0], expected[1])
    assert torch.equal(once.results[0][1], plain)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_layer_calls_the_model_while_activations_are_computed_again(model, use_reentrant):
    gradients = []
    for inner in (False, True):
        model.zero_grad()
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        if inner:
            once = Once(model.get_decoder().layers[0].self_attn, lambda: logits(model, ROWS[2], 2))
        model(ROWS[0], user_indices=torch.tensor([1]), use_cache=False).logits.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(once.results) == 2  # in the call, and when its activations were computed again
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


# --- After a call that failed -----------------------------------------------------------------------------------------


def interrupt(*args):
    raise KeyboardInterrupt


def out_of_memory(*args):
    raise RuntimeError("out of memory")


def part(model, where):
    decoder = model.get_decoder()
    return {
        "model": model, "decoder": decoder, "embeddings": model.get_input_embeddings(), "users": model.user_model,
        "layer": decoder.layers[1], "head": model.lm_head,
    }[where]  # fmt: skip


@pytest.mark.parametrize("prepend", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("error", [out_of_memory, interrupt])
@pytest.mark.parametrize("where", ["model", "decoder", "embeddings", "users", "layer", "head"])
def test_the_call_after_a_failed_one_is_right(model, where, error, prepend):
    expected = [logits(model, ROWS[2], user) for user in (None, 2)]
    plain = model.get_decoder()(ROWS[2]).last_hidden_state
    handle = part(model, where).register_forward_pre_hook(error, prepend=prepend)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        logits(model, ROWS[2], 1)
    handle.remove()
    assert not in_call()
    assert torch.equal(model.get_decoder()(ROWS[2]).last_hidden_state, plain)
    for user, values in zip((None, 2), expected, strict=True):
        assert torch.equal(logits(model, ROWS[2], user), values)


@pytest.mark.parametrize("error", [out_of_memory, interrupt])
@pytest.mark.parametrize("where", ["model", "decoder", "users", "layer"])
def test_the_call_after_one_of_packed_pairs_failed_is_right(where, error):
    model = with_fused_head(make_model("llama"))
    batch = collate(PAIRS)
    packed = pack_pairs(**batch)
    expected = score(model, batch, USERS["users"], packed)[0].log_probs, logits(model, ROWS[2], None)
    handle = part(model, where).register_forward_pre_hook(error)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        score(model, batch, USERS["users"], packed)
    handle.remove()
    assert torch.equal(logits(model, ROWS[2], None), expected[1])
    assert torch.equal(score(model, batch, USERS["users"], packed)[0].log_probs, expected[0])


# --- Copies, compilation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_and_its_original_call_each_other(model, how):
    copied = how(model)
    assert type(copied) is type(model)
    copied.user_model.generic_prompt.data.normal_()
    expected = logits(model, ROWS[0], 1), logits(copied, ROWS[2], 2)
    assert torch.equal(logits(copied, ROWS[0], None), logits(model, ROWS[0], None))
    assert not torch.equal(logits(copied, ROWS[0], 1), expected[0])
    once = Once(model.get_decoder().layers[0], lambda: logits(copied, ROWS[2], 2))
    assert torch.equal(logits(model, ROWS[0], 1), expected[0])
    assert torch.equal(once.results[0], expected[1])
    detach_user_model(copied)
    assert torch.equal(logits(model, ROWS[0], 1), expected[0])


@pytest.mark.slow
def test_compiled_calls_are_one_graph_each(model):
    expected = {user: logits(model, ROWS[0], user) for user in (None, 1, 2)}
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.compiler.reset()
    for user in (None, 1, 2, None, 1):
        assert torch.equal(logits(compiled, ROWS[0], user), expected[user])
    assert counter.frame_count == 2  # with users and without
    torch.compiler.reset()


# --- The place itself -------------------------------------------------------------------------------------------------


def test_what_was_kept_is_taken_once_by_its_owner_and_the_last_comes_first(model):
    ann, bo = object(), object()
    taken = []

    def use():
        for owner, value in ((ann, 1), (bo, 2), (ann, 3), (ann, None)):
            keep(owner, "name", value)
        taken.extend(take(owner, "name") for owner in (ann, ann, bo, bo, ann, ann))
        taken.append(take(ann, "another name"))

    Once(model.get_decoder().layers[0], use)
    logits(model, ROWS[0], None)
    assert taken == [None, 3, 2, None, 1, None, None]


def test_outside_of_a_call_there_is_nothing_to_take_and_no_place_to_keep():
    assert take(object(), "users") is None
    with pytest.raises(RuntimeError, match="Attach the user model again"):
        keep(object(), "users", 1)


# --- How many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("busy", [False, True])
def test_the_number_of_threads_is_what_is_fastest_now(busy):
    """A clock in place of a machine: two threads are faster when it is idle, and five times as slow when it is busy."""
    seconds = {1: 0.02, 2: 0.1 if busy else 0.005}
    before = torch.get_num_threads()
    assert fastest([1, 2], lambda: time.sleep(seconds[torch.get_num_threads()]), rounds=2) == (1 if busy else 2)
    assert torch.get_num_threads() == before
    assert fastest_num_threads(rounds=1) in (1, 2, 4)
