"""The engine writes what `generate` writes, whoever else is written for, joins or leaves meanwhile."""

import asyncio
import copy
import random
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import WORDS
from engines import USERS, generate_alone, make_engine, make_tasks
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig

from trl_personal import UserVocab
from trl_personal.engine.batch import Batch
from trl_personal.engine.rows import Row, StopTexts, TextStream
from trl_personal.engine.transformers import TransformersEngine
from trl_personal.models.known_users import KnownUsers
from trl_personal.serving.interface import EngineError, Job, Piece, RequestError, Sampling


async def answer(engine, text, user, sampling, **kwargs):
    pieces = [piece async for piece in engine.generate(Job(engine.encode(text), sampling, user, **kwargs))]
    return "".join(piece.text for piece in pieces), pieces


def run(engine, work):
    async def whole():
        await engine.start()
        try:
            return await work()
        finally:
            await engine.stop()

    return asyncio.run(asyncio.wait_for(whole(), 60))


async def answer_all(engine, tasks, pause=0.004):
    async def one(text, user, num_tokens, delay):
        await asyncio.sleep(delay)
        return (await answer(engine, text, user, Sampling(num_tokens, 0.0)))[0]

    return await asyncio.gather(*(one(*task, pause * number) for number, task in enumerate(tasks)))


@pytest.mark.parametrize(("family", "lora"), [("llama", True), ("gptj", False), ("qwen2", False)])
def test_answers_are_those_of_generate(family, lora):
    engine, tasks = make_engine(family, lora=lora), make_tasks(16)
    expected = [generate_alone(engine, *task) for task in tasks]
    assert len(set(expected)) > 8
    assert run(engine, lambda: answer_all(engine, tasks)) == expected


def test_64_requests_of_16_users_while_users_come_and_go():
    """Each is answered as alone. The rows of users move in the table meanwhile, and nobody gets another one's answer."""
    engine, tasks = make_engine(), make_tasks()
    expected = [generate_alone(engine, *task) for task in tasks]
    assert len(set(expected)) > 32
    first = engine._causal_lm.user_model
    stop = threading.Event()

    def change():
        while not stop.is_set():
            more = first.resize(20)
            engine.set_users(KnownUsers(more, UserVocab([*USERS, *"abcd"])))
            order = random.Random(1).sample(range(1, 21), 20)
            vocab = UserVocab([more_users[row - 1] for row in order])
            engine.set_users(KnownUsers(more.keep_rows(order), vocab))
            engine.set_users(KnownUsers(first, UserVocab(USERS)))

    more_users = [*USERS, *"abcd"]

    async def work():
        thread = threading.Thread(target=change)
        thread.start()
        try:
            return await answer_all(engine, tasks)
        finally:
            stop.set()
            await asyncio.to_thread(thread.join)

    assert run(engine, work) == expected


def test_a_user_who_has_left_is_unknown_and_one_who_has_joined_is_not():
    engine = make_engine()
    alone = generate_alone(engine, "please write", "user 3", 8)
    generic = generate_alone(engine, "please write", None, 8, user_ids=[None])
    assert alone != generic

    async def work():
        found = []
        for user_model, users in (
            (engine._causal_lm.user_model, USERS),
            (engine._causal_lm.user_model.keep_rows([1, 2]), USERS[:2]),
        ):
            await asyncio.to_thread(engine.set_users, KnownUsers(user_model, UserVocab(users)))
            job = Job(engine.encode("please write"), Sampling(8, 0.0), "user 3")
            text = "".join([piece.text async for piece in engine.generate(job)])
            found.append((text, job.answered_for, engine.knows("user 3"), engine.num_users))
        return found

    assert run(engine, work) == [(alone, "user", True, 16), (generic, "unknown", False, 2)]


def test_strength_and_blends_are_those_of_generate():
    engine = make_engine()
    blend = {"user 1": 0.7, "user 2": 0.3}
    cases = [
        ("user 1", 0.5),
        (blend, 1.0),
        (blend, 2.0),
        ("user 1", 0.0),
        (None, 1.0),
        ({"user 1": 0.7, "eve": 0.3}, 1.0),
    ]
    expected = [
        generate_alone(engine, "the story", None, 10, user_ids=[user], user_strength=[strength])
        for user, strength in cases
    ]

    async def work():
        return await asyncio.gather(
            *(answer(engine, "the story", user, Sampling(10, 0.0), user_strength=s) for user, s in cases)
        )

    assert [text for text, _ in run(engine, work)] == expected


def test_a_plain_model_is_served_without_users():
    engine = make_engine(users=None)
    expected = generate_alone(engine, "please write a story", None, 12)
    text, _ = run(engine, lambda: answer(engine, "please write a story", "ann", Sampling(12, 0.0)))
    assert (text, engine.num_users, engine.knows("ann")) == (expected, 0, False)


def test_sampled_answers_depend_on_their_seed_and_not_on_who_is_written_for_beside():
    engine = make_engine()
    sampling = Sampling(16, 0.9, 0.8, seed=7)

    async def work():
        alone = await answer(engine, "the story", "user 1", sampling)
        crowd = [answer(engine, text, user, Sampling(n, 1.0)) for text, user, n in make_tasks(10)]
        return alone, (await asyncio.gather(*crowd, answer(engine, "the story", "user 1", sampling)))[-1]

    (alone, _), (among_others, _) = run(engine, work)
    assert alone == among_others


def test_tokens_are_drawn_with_their_probabilities():
    """1,000 first tokens at temperature 3 and top_p 0.9, against the probabilities of the model (chi-squared, 0.999)."""
    from scipy.stats import chi2
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    engine = make_engine(max_rows=500)
    ids = torch.tensor([engine.encode("the story")])
    indices = torch.tensor([2])
    with torch.no_grad():
        logits = engine.model(ids, user_indices=indices).logits[:, -1]
    expected = TopPLogitsWarper(0.9)(ids, TemperatureLogitsWarper(3.0)(ids, logits)).softmax(-1)[0]

    async def first(seed):
        job = Job(ids[0].tolist(), Sampling(1, 3.0, 0.9, seed=seed), "user 1")
        return "".join([piece.text async for piece in engine.generate(job)])

    async def work():
        return await asyncio.gather(*(first(seed) for seed in range(1000)))

    found = run(engine, work)
    words = ["" if word in ("<pad>", "<bos>", "<eos>") else word for word in WORDS]
    probabilities = {}
    for word, probability in zip(words, expected.tolist(), strict=True):
        probabilities[word] = probabilities.get(word, 0) + probability
    assert all(probabilities[word] > 0 for word in set(found))
    likely = {word: p for word, p in probabilities.items() if p > 0.005}
    statistic = sum((found.count(word) - 1000 * p) ** 2 / (1000 * p) for word, p in likely.items())
    assert len(likely) >= 3
    assert statistic < chi2.ppf(0.999, len(likely))


def test_every_row_has_its_own_end():
    engine = make_engine()
    whole = generate_alone(engine, "please write", "user 5", 24)
    words = whole.split()
    stop = f" {words[3]} {words[4]}"

    async def work():
        return await asyncio.gather(
            answer(engine, "please write", "user 5", Sampling(24, 0.0)),
            answer(engine, "please write", "user 5", Sampling(3, 0.0)),
            answer(engine, "please write", "user 5", Sampling(24, 0.0, stop=("nothing", stop))),
        )

    (one, _), (short, short_pieces), (stopped, stopped_pieces) = run(engine, work)
    assert one == whole
    assert short == " ".join(words[:3])
    assert [piece.finish_reason for piece in short_pieces] == [None, None, "length"]
    assert stopped == whole[: whole.index(stop)]
    assert stopped_pieces[-1].finish_reason == "stop"


def test_a_new_request_waits_for_one_token():
    """It begins while the others are at work, before they have written more than a few tokens."""
    engine = make_engine()
    engine.model.generation_config.eos_token_id = None
    engine = TransformersEngine(engine.model, engine._tokenizer, "tiny")

    async def work():
        seen = []

        async def long():
            async for _ in engine.generate(Job([1, 5, 6], Sampling(50, 0.0), "user 1")):
                seen.append(time.monotonic())

        writing = asyncio.create_task(long())
        while len(seen) < 10:
            await asyncio.sleep(0.001)
        job = Job([1, 7], Sampling(1, 0.0), "user 2")
        created = time.monotonic()
        _ = [piece async for piece in engine.generate(job)]
        await writing
        return sum(created <= moment <= job.started for moment in seen), len(seen)

    between, number = run(engine, work)
    assert number == 50
    assert between <= 2


def test_no_more_rows_than_there_is_room_for():
    engine = make_engine(max_rows=3)
    most = 0

    async def work():
        tasks = [asyncio.create_task(answer(engine, *task[:2], Sampling(task[2], 0.0))) for task in make_tasks(10)]
        nonlocal most
        while not all(task.done() for task in tasks):
            most = max(most, engine.gauges()["running"])
            await asyncio.sleep(0.001)
        return [task.result()[0] for task in tasks]

    expected = [generate_alone(engine, *task) for task in make_tasks(10)]
    assert run(engine, work) == expected
    assert most <= 3


def test_tokens_of_a_batch_are_bounded():
    """Each row reserves 1 + 3 + 20 tokens: two fit into 50."""
    engine, sizes = make_engine(max_batch_tokens=50), []
    layer = engine.model.get_input_embeddings()
    layer.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))

    async def one():
        return [piece async for piece in engine.generate(Job([5], Sampling(20, 0.0), "user 1"))]

    async def work():
        return await asyncio.gather(*(one() for _ in range(6)))

    run(engine, work)
    assert max(sizes) == 2


def test_nothing_more_is_written_for_who_has_gone():
    engine, calls = make_engine(), []

    def count(module, inputs, output):
        calls.append(len(output))
        time.sleep(0.02)

    engine.model.get_input_embeddings().register_forward_hook(count)

    async def work():
        pieces = engine.generate(Job([5], Sampling(50, 0.0), "user 1"))
        await anext(pieces)
        await pieces.aclose()
        while engine.gauges()["running"] or engine.gauges()["waiting"]:
            await asyncio.sleep(0.001)

    run(engine, work)
    assert len(calls) < 25  # of 50


def test_layers_with_a_window_have_batches_of_their_own():
    """Their caches cannot be put together; requests are answered in turn, with the same text."""
    config = Gemma3TextConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
        layer_types=["sliding_attention", "full_attention"],
    )
    torch.manual_seed(0)
    engine, tasks = make_engine(model=AutoModelForCausalLM.from_config(config)), make_tasks(8)
    expected = [generate_alone(engine, *task) for task in tasks]
    assert run(engine, lambda: answer_all(engine, tasks, 0.01)) == expected


def test_a_cancelled_answer_makes_room():
    engine = make_engine(max_rows=1)

    async def work():
        pieces = engine.generate(Job([1, 5], Sampling(55, 0.0), "user 1"))
        await anext(pieces)
        await pieces.aclose()
        return await answer(engine, "please", "user 2", Sampling(3, 0.0))

    expected = generate_alone(engine, "please", "user 2", 3)
    assert run(engine, work)[0] == expected
    assert engine.gauges()["running"] == 0


def test_a_failure_ends_the_answers_of_its_batch_only(monkeypatch):
    engine = make_engine()
    begin = engine._writer.begin

    def fails_once(rows):
        monkeypatch.setattr(engine._writer, "begin", begin)
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine._writer, "begin", fails_once)

    async def work():
        with pytest.raises(EngineError, match="failed at this request"):
            await answer(engine, "please", "user 1", Sampling(3, 0.0))
        return await answer(engine, "please", "user 1", Sampling(3, 0.0))

    expected = generate_alone(engine, "please", "user 1", 3)
    assert run(engine, work)[0] == expected


def test_prompts_are_encoded_as_for_training():
    engine = make_engine()
    assert engine.encode("please write") == [1, 6, 7]
    assert engine.encode([{"role": "user", "content": "please write"}]) == [1, 6, 7]
    with pytest.raises(RequestError, match="trained without profiles"):
        engine.encode("please write", "Likes it short.")
    engine._causal_lm.user_profile_template = "i like {profile}"
    assert engine.encode("please write", "dogs") == [1, *(WORDS.index(w) for w in "i like dogs please write".split())]


def test_text_comes_in_whole_characters():
    text = "naïve 👍🏽 – 日本"
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"))
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.flush() == text
    assert "\ufffd" not in "".join(pieces)


def test_stop_texts_are_held_back_until_they_cannot_be():
    stops = StopTexts(["aab", "bc"])
    assert [stops.push(letter) for letter in "xaaab"] == [
        ("x", False),
        ("", False),
        ("", False),
        ("a", False),
        ("", True),
    ]
    stops = StopTexts(["aab"])
    assert (stops.push("aa"), stops.flush()) == (("", False), "aa")


def make_batch(lengths, width=2):
    rows = [SimpleNamespace(is_done=False, num_left=5) for _ in lengths]
    longest = max(lengths)
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    cache = DynamicCache()
    keys = torch.arange(len(lengths) * (longest - 1) * width, dtype=torch.float).view(
        len(lengths), 1, longest - 1, width
    )
    cache.update(keys, -keys, 0)
    return Batch(rows, torch.arange(mask.numel()).view(mask.shape) * mask, mask, cache)


def test_batches_are_put_together_and_taken_apart():
    """Two rows of 3 and 5 tokens and one of 8; then the one of 8 leaves, and the columns that only it had."""
    batch, other = make_batch([3, 5]), make_batch([8])
    before, keys = copy.deepcopy(batch), other.cache.layers[0].keys.clone()
    assert batch.can_take(other)
    batch.take(other)
    assert batch.mask.sum(1).tolist() == [3, 5, 8]
    assert batch.cache.layers[0].keys.shape == (3, 1, 7, 2)
    assert torch.equal(batch.cache.layers[0].keys[2:], keys)
    assert torch.equal(batch.cache.layers[0].keys[:2, :, 3:], before.cache.layers[0].keys)
    batch.rows[2].is_done = True
    batch.drop_done()
    assert torch.equal(batch.ids, before.ids)
    assert torch.equal(batch.mask, before.mask)
    assert torch.equal(batch.cache.layers[0].values, before.cache.layers[0].values)


def test_a_batch_that_would_be_mostly_padding_stays_alone():
    assert not make_batch([10] * 40).can_take(make_batch([600]))


def test_a_row_tells_what_its_tokens_say():
    row = Row(Job([1], Sampling(3, 0.0, stop=("c",))), lambda ids: "".join("abcd"[i] for i in ids), {3})
    assert [row.accept(token) for token in (0, 1, 2)] == [Piece("a", 1), Piece("b", 1), Piece("", 1, "stop")]
    row = Row(Job([1], Sampling(9, 0.0)), lambda ids: "".join("abcd"[i] for i in ids), {3})
    assert [row.accept(token) for token in (0, 3)] == [Piece("a", 1), Piece("", 1, "stop")]
