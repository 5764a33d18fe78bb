"""What can be told of the engine of vLLM without vLLM: prompts, arguments, and what it may import."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import make_tokenizer
from safetensors.torch import load_file, save_file
from test_exporting import USERS, T, make_personalized

from trl_personal.exporting.vllm_folder import export_for_vllm
from trl_personal.models.blending import blended_soft_prompts
from trl_personal.serving.__main__ import main
from trl_personal.serving.manifest import USERS_FOLDER, read_manifest
from trl_personal.serving.vllm_engine import PLACEHOLDER_ID, PromptMaker, VllmEngine, engine_arguments
from trl_personal.users import UserVocab


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "merged"
    export_for_vllm(make_personalized("llama"), make_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def beside_adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "adapter"
    export_for_vllm(make_personalized("llama", lora=True), make_tokenizer(), folder, keep_adapter=True)
    return folder


def prompt_maker(folder):
    return PromptMaker(folder, read_manifest(folder), UserVocab.from_pretrained(folder / USERS_FOLDER))


def test_a_user_a_blend_and_a_strength_are_those_of_generate(exported):
    maker, model = prompt_maker(exported), make_personalized("llama")
    cases = [
        ("ann", 1.0, "user"),
        ("ann", 0.5, "user"),
        ("x%22", -1.0, "user"),
        (None, 1.0, "generic"),
        ("nobody", 1.0, "unknown"),
        ("nobody", 0.5, "unknown"),
        ({"ann": 0.7, "x%22": 0.5}, 0.5, "blend"),
        ({"ann": 0.7, "nobody": 0.5}, 1.0, "blend"),
        ({"nobody": 1.0}, 1.0, "unknown"),
    ]
    for user, strength, whom in cases:
        found, answered_for = maker.soft_prompt(user, strength)
        expected, _ = blended_soft_prompts(model.user_model, model.user_vocab, [user], [strength], torch.device("cpu"))
        torch.testing.assert_close(found, expected[0].detach(), rtol=0, atol=1e-6)
        assert answered_for == whom
    assert torch.equal(maker.soft_prompt("ann")[0], model.user_model(torch.tensor([1]))[0].detach())


@pytest.mark.parametrize(("ids", "position"), [([1, 5, 6], 1), ([5, 6], 0), ([1], 1)])
def test_a_prompt_has_the_soft_prompt_where_training_puts_it(exported, ids, position):
    maker = prompt_maker(exported)
    soft_prompt, _ = maker.soft_prompt("ann")
    prompt = maker.make(ids, soft_prompt)
    columns = slice(position, position + T)
    assert prompt["prompt_token_ids"] == [*ids[:position], *[PLACEHOLDER_ID] * T, *ids[position:]]
    is_token = [True] * (len(ids) + T)
    is_token[columns] = [False] * T
    assert prompt["prompt_is_token_ids"] == is_token
    assert torch.equal(prompt["prompt_embeds"][columns], soft_prompt)
    assert prompt["prompt_embeds"].shape == (len(ids) + T, 32)


def test_beside_an_adapter_a_prompt_is_the_same(beside_adapter):
    soft_prompt, _ = prompt_maker(beside_adapter).soft_prompt("ann")
    prompt = prompt_maker(beside_adapter).make([1, 5, 6], soft_prompt)
    assert prompt["prompt_is_token_ids"] == [True, *[False] * T, True, True]


@pytest.fixture
def with_adapted_embeddings(beside_adapter, tmp_path):
    """The same export with a LoRA of the token embeddings too."""
    folder = tmp_path / "export"
    shutil.copytree(beside_adapter, folder)
    path = folder / "adapter" / "adapter_model.safetensors"
    added = {f"base_model.model.model.embed_tokens.lora_embedding_{part}": torch.zeros(8, 8) for part in "AB"}
    save_file(load_file(path) | added, path)
    return folder


def test_beside_an_adapter_of_the_token_embeddings_all_is_embeddings(beside_adapter, with_adapted_embeddings):
    manifest = read_manifest(beside_adapter)
    maker = PromptMaker(with_adapted_embeddings, manifest, UserVocab(USERS))
    model = make_personalized("llama", lora=True)
    soft_prompt, _ = maker.soft_prompt("ann")
    prompt = maker.make([1, 5, 6], soft_prompt)
    tokens = model.get_input_embeddings()(torch.tensor([1, 5, 6])).detach()
    assert torch.equal(prompt["prompt_embeds"], torch.cat([tokens[:1], soft_prompt, tokens[1:]]))
    assert prompt.keys() == {"prompt_embeds", "cache_salt"}
    maker.dtype = torch.bfloat16
    assert maker.make([1], soft_prompt)["prompt_embeds"].dtype == torch.bfloat16
    arguments = engine_arguments(with_adapted_embeddings, manifest, {"max_num_seqs": 128})
    assert arguments["max_num_seqs"] == 1  # vLLM 0.32 cannot mix embeddings and token ids in a step there
    assert "lora_target_modules" not in arguments


def test_each_soft_prompt_has_a_salt_of_its_own(exported):
    maker = prompt_maker(exported)
    users = [*USERS, None, {"ann": 0.5}]
    salts = [maker.make([1, 5], maker.soft_prompt(user)[0])["cache_salt"] for user in users]
    assert len(set(salts)) == len(users)
    assert salts == [maker.make([6], maker.soft_prompt(user)[0])["cache_salt"] for user in users]
    assert maker.make([5], maker.soft_prompt("nobody")[0])["cache_salt"] == salts[len(USERS)]


def test_arguments_that_do_not_go_with_soft_prompts_are_refused(exported, beside_adapter):
    manifest = read_manifest(exported)
    for name in ("model", "enable_prompt_embeds", "enable_lora", "speculative_config"):
        with pytest.raises(ValueError, match=f"`{name}` is no argument of a served export"):
            engine_arguments(exported, manifest, {name: "x"})
    with pytest.raises(ValueError, match="LMCacheConnectorV1.*would give a user the blocks of another"):
        VllmEngine(exported, kv_transfer_config={"kv_connector": "LMCacheConnectorV1"})
    with pytest.raises(ValueError, match="external KV cache kv_offloading_size"):
        VllmEngine(exported, kv_offloading_size=4.0)
    arguments = engine_arguments(beside_adapter, read_manifest(beside_adapter), {"enable_prefix_caching": False})
    assert arguments == {
        "model": str(beside_adapter),
        "enable_prefix_caching": False,
        "enable_prompt_embeds": True,
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": 8,
        "lora_target_modules": ["q_proj", "v_proj"],
    }


def test_a_table_of_another_shape_is_refused(exported, tmp_path):
    manifest = read_manifest(exported)
    (tmp_path / USERS_FOLDER).mkdir()
    save_file({"soft_prompts": torch.zeros(3, T, 32)}, tmp_path / USERS_FOLDER / "soft_prompts.safetensors")
    with pytest.raises(ValueError, match=r"have shape \(3, 3, 32\), not \(5, 3, 32\)"):
        PromptMaker(tmp_path, manifest, UserVocab(USERS))


def test_the_engine_says_who_is_known(exported):
    engine = VllmEngine(exported)
    assert (engine.name, engine.num_users, engine.has_profiles, engine.admin) == ("merged", 4, False, None)
    assert engine.knows("ann")
    assert not engine.knows("nobody")
    assert not engine.is_alive
    assert VllmEngine(exported, "other").name == "other"


def test_the_module_says_in_a_line_what_is_wrong(exported, tmp_path, capsys):
    assert main([str(tmp_path), "--engine", "vllm"]) == 1
    assert "no exported model" in capsys.readouterr().err
    assert main([str(exported), "--engine", "vllm", "--host", "0.0.0.0"]) == 1
    assert "Make a key" in capsys.readouterr().err
    arguments = '{"kv_transfer_config": {"kv_connector": "NixlConnector"}}'
    assert main([str(exported), "--engine", "vllm", "--engine_args", arguments]) == 1
    assert "external KV cache NixlConnector" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(exported), "--engine", "vllm", "--engine_args", "[1]"])
    assert "must be a JSON object" in capsys.readouterr().err


def test_serving_imports_nothing_of_ours_that_an_engine_has_not(exported):
    """In the engine's environment there is no trl, peft, datasets or accelerate, and another transformers."""
    code = f"""
import sys
for name in ("trl", "peft", "datasets", "accelerate", "transformers", "scipy", "matplotlib", "rich", "huggingface_hub"):
    sys.modules[name] = None
import trl_personal.serving.server, trl_personal.serving.run, trl_personal.serving.__main__
from trl_personal.serving.vllm_engine import VllmEngine
engine = VllmEngine({str(exported)!r})
print(engine.num_users, engine._prompts.soft_prompt("ann")[0].shape)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "4 torch.Size([3, 32])\n"
