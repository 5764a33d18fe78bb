"""
The engine of vLLM on a real export: token by token what transformers writes, and no user's blocks for another.

It runs in an environment of its own (docs/serving_vllm.md), where the package is installed without its dependencies:

    VLLM_EXPORT=EXPORT VLLM_EXPORT_LORA=EXPORT_LORA pytest --noconftest -c /dev/null -s tests/engines
"""

import asyncio
import json
import os
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_personal.serving.interface import Job, RequestError, Sampling
from trl_personal.serving.vllm_engine import VllmEngine


pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: see docs/serving_vllm.md")
EXPORT, EXPORT_LORA = os.environ.get("VLLM_EXPORT"), os.environ.get("VLLM_EXPORT_LORA")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(EXPORT is None, reason="VLLM_EXPORT names no exported folder of a real model with 100 users"),
]
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
os.environ.update(SETTINGS)


NUM_USERS, NUM_TOKENS, TIE, MAX_TIES = 100, 32, 1e-3, 2
QUESTIONS = [
    "What is a good hobby for a rainy day?",
    "Write two sentences about the sea.",
    "How do I make a cup of tea?",
    "Give me a name for a small cat.",
]
LONG = " ".join(f"Fact {i}: a person in town {i} likes thing number {i * 7 % 31}." for i in range(22))


def make_engine(folder, **arguments):
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 128, "seed": 0}
    return VllmEngine(folder, **defaults | arguments)


async def answer(engine, job):
    """Token ids, the number of cached tokens of the prompt, and the text, of one answer."""
    from vllm import SamplingParams

    soft_prompt, _ = engine._prompts.soft_prompt(job.user, job.user_strength)
    prompt = engine._prompts.make(job.prompt_ids, soft_prompt)
    parameters = SamplingParams(temperature=0, max_tokens=job.sampling.max_tokens, ignore_eos=False)
    async for output in engine._llm.generate(
        prompt, parameters, f"test-{time.monotonic_ns()}", lora_request=engine._lora
    ):
        last = output
    return list(last.outputs[0].token_ids), last.num_cached_tokens or 0


def merge(model, adapter):
    """Add a LoRA to the weights by hand; PEFT is not in this environment."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, before in tensors.items():
        if name.endswith(".lora_A.weight"):
            after = tensors[name.replace(".lora_A.", ".lora_B.")]
            module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            module.weight.data += config["lora_alpha"] / config["r"] * (after @ before).float()


def reference(folder, engine, jobs):
    """Transformers' greedy tokens from the same embeddings, and the distance of the two best logits at each."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if engine.manifest.adapter_rank is not None:
        merge(model, Path(folder) / "adapter")
    embedding = model.get_input_embeddings()
    end = model.generation_config.eos_token_id
    written = {}
    for question in dict.fromkeys(tuple(job.prompt_ids) for job in jobs):  # of one length: no padding
        numbers = [number for number, job in enumerate(jobs) if tuple(job.prompt_ids) == question]
        tokens = embedding(torch.tensor(question)).detach()
        position = engine.manifest.layout.position(question)
        prompts = [engine._prompts.soft_prompt(jobs[number].user)[0] for number in numbers]
        embeds = torch.stack([torch.cat([tokens[:position], prompt, tokens[position:]]) for prompt in prompts])
        with torch.no_grad():
            out = model.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        best = torch.stack([step.topk(2).values for step in out.logits], dim=1)
        for number, ids, two in zip(numbers, out.sequences.tolist(), best, strict=True):
            length = ids.index(end) + 1 if end in ids else len(ids)
            written[number] = (ids[:length], (two[:, 0] - two[:, 1]).tolist())
    return [written[number] for number in range(len(jobs))]


def compare(found, expected):
    """How many answers are equal, differ at a tie, or differ."""
    equal = ties = 0
    worst = []
    for ids, (tokens, distances) in zip(found, expected, strict=True):
        if ids == tokens:
            equal += 1
            continue
        place = next(
            (i for i, (a, b) in enumerate(zip(ids, tokens, strict=False)) if a != b), min(len(ids), len(tokens))
        )
        worst.append(distances[min(place, len(distances) - 1)])
        ties += worst[-1] <= TIE
    return {"equal": equal, "ties": ties, "different": len(expected) - equal - ties, "distances": worst}


def cpu_seconds():
    """Of this process and its children."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def report(name, **figures):
    print(f"\nRESULT {name} {json.dumps(figures)}", flush=True)


def take(values, number):
    return [value for value, _ in zip(values, range(number), strict=False)]


LOOP = asyncio.new_event_loop()


@pytest.fixture(scope="module", params=["merged", "lora"])
def served(request):
    """The folder and the engine, which starts once for all tests."""
    folder = EXPORT if request.param == "merged" else EXPORT_LORA
    if folder is None:
        pytest.skip("VLLM_EXPORT_LORA names no folder that was exported beside its adapter")
    engine = make_engine(folder)
    LOOP.run_until_complete(engine.start())
    yield folder, engine
    LOOP.run_until_complete(engine.stop())


def test_no_user_reuses_the_blocks_of_another(served):
    folder, engine = served
    ids = engine.encode([{"role": "user", "content": f"{LONG} {QUESTIONS[0]}"}])
    users = [*take(engine._vocab, 4), None]

    async def run():
        jobs = [Job(ids, Sampling(12, temperature=0.0), user) for user in users]
        return [[await answer(engine, job) for job in jobs] for _ in range(2)]

    rounds = LOOP.run_until_complete(run())
    cached = [[number for _, number in answers] for answers in rounds]
    length = len(ids) + engine.manifest.layout.num_virtual_tokens
    report("cache", folder=Path(folder).name, prompt_tokens=length, cached=cached)
    assert cached[0] == [0] * len(users)
    assert min(cached[1]) >= 0.8 * length
    assert [tokens for tokens, _ in rounds[0]] == [tokens for tokens, _ in rounds[1]]


def test_a_hundred_users_in_one_batch_get_what_transformers_writes(served):
    folder, engine = served
    jobs = []
    for number, user in enumerate(take(engine._vocab, NUM_USERS)):
        ids = engine.encode([{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}])
        jobs.append(Job(ids, Sampling(NUM_TOKENS, temperature=0.0), user))

    async def run():
        found = await asyncio.gather(*(answer(engine, job) for job in jobs))
        return found, [piece async for piece in engine.generate(jobs[0])]

    found, pieces = LOOP.run_until_complete(run())
    expected = reference(folder, engine, jobs)
    result = compare([ids for ids, _ in found], expected)
    distinct = len({tuple(tokens) for tokens, _ in expected})
    report("users", folder=Path(folder).name, users=len(jobs), distinct=distinct, **result)
    assert len(jobs) >= NUM_USERS
    assert distinct >= 30
    assert result["different"] == 0
    assert result["ties"] <= MAX_TIES
    text = AutoTokenizer.from_pretrained(folder).decode(found[0][0], skip_special_tokens=True)
    assert "".join(piece.text for piece in pieces) == text
    assert sum(piece.num_tokens for piece in pieces) == len(found[0][0])
    assert pieces[-1].finish_reason in ("stop", "length")


def test_cpu_time_is_that_of_prompts_that_are_as_long(served):
    """Users' prompts against prompts with T ordinary tokens in their place, alternated, with the prefix cache emptied."""
    from vllm import SamplingParams

    folder, engine = served
    users, count = take(engine._vocab, 32), engine.manifest.layout.num_virtual_tokens
    ids = engine.encode([{"role": "user", "content": QUESTIONS[0]}])
    parameters = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    hard = [{"prompt_token_ids": [ids[0], *[100 + i] * count, *ids[1:]]} for i in range(len(users))]

    def make():
        return [engine._prompts.make(ids, engine._prompts.soft_prompt(user)[0]) for user in users]

    async def write(prompt, name):
        async for _ in engine._llm.generate(prompt, parameters, name, lora_request=engine._lora):
            pass

    async def timed(prompts):
        await engine._llm.reset_prefix_cache()
        before = cpu_seconds()
        await asyncio.gather(*(write(prompt, f"{time.monotonic_ns()}-{i}") for i, prompt in enumerate(prompts())))
        return cpu_seconds() - before

    async def run():
        return [(await timed(make), await timed(lambda: hard)) for _ in range(6)][1:]  # the first warms up

    pairs = LOOP.run_until_complete(run())
    ratios = sorted(a / b for a, b in pairs)
    report("cpu", folder=Path(folder).name, pairs=pairs, ratios=ratios, median=ratios[len(ratios) // 2])
    assert ratios[len(ratios) // 2] <= 1.05


def test_external_caches_and_profiles_are_refused():
    with pytest.raises(ValueError, match="LMCacheConnectorV1.*would give a user the blocks of another"):
        make_engine(EXPORT, kv_transfer_config={"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"})
    engine = make_engine(EXPORT)
    engine._config_args["kv_offloading_size"] = 1.0  # past the first check
    with pytest.raises(ValueError, match="external KV cache"):
        LOOP.run_until_complete(engine.start())
    with pytest.raises(RequestError, match="without profiles"):
        engine.encode("Why?", user_profile="likes cats")
