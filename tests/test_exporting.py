"""Exports: the folders that other engines load, without this package."""

import json
import os
import subprocess
import sys

import jinja2
import pytest
import torch
from conftest import CONFIGS, LLAMA_SIZES, LORA_TARGETS, ROOT, SIZES, make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from tokenizers import models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, GPT2Config

from trl_personal import (
    AutoPersonalizedModelForCausalLM,
    IndividualUserModel,
    UserModelConfig,
    UserVocab,
    attach_user_model,
)
from trl_personal.cli import main
from trl_personal.exporting import token_mass, tokens_folder
from trl_personal.exporting.chat_template import with_users
from trl_personal.exporting.language_model import embedding_scale
from trl_personal.exporting.tokens_folder import export_as_tokens
from trl_personal.exporting.vllm_folder import export_for_vllm
from trl_personal.serving.manifest import read_manifest
from trl_personal.serving.table import soft_prompt_table, token_embedding_table


T = 3
USERS = ["ann", "b o|é/", 'x"{{ 7 }}', "x%22"]
CONFIGS_HERE = {
    "gptj": CONFIGS["gptj"],  # a bias at the output
    "llama": CONFIGS["llama"],
    "gemma3": Gemma3TextConfig(head_dim=8, **LLAMA_SIZES),  # tied, and scaled
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SIZES),  # tied, learned positions
}
TEMPLATE = "<bos>{% for message in messages %}{{ message['content'] }} {% endfor %}"
PROMPTS = [[1, 5, 6, 7], [8, 9, 5, 6], [1, 10, 11, 12]]  # with BOS and without
ROWS = [1, 2, 0]

# in a process of its own, in which nothing of ours can be imported
ELSEWHERE = """
import json, sys, torch
for name in ("trl_personal", "trl", "peft"):
    sys.modules[name] = None
from tokenizers import models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
torch.set_num_threads(1)
for family, folder in json.load(sys.stdin).items():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    given = torch.load(folder + ".pt")
    users = json.load(open(folder + "/user_tokens.json"))
    first = [users["users"]["ann"], users["users"]["b o|é/"], users["generic_user"]]
    rows = []
    for ids, token in zip(given["ids"].tolist(), first):
        start = tokenizer.convert_tokens_to_ids(token)
        place = int(ids[0] == 1)
        rows.append([*ids[:place], *range(start, start + users["num_virtual_tokens"]), *ids[place:]])
    with torch.no_grad():
        logits = model(torch.tensor(rows)).logits[:, users["num_virtual_tokens"] :, : given["logits"].shape[-1]]
    difference = float((logits - given["logits"]).abs().max())
    set_seed(0)
    n = 400 if family == "gpt2" else 4  # there they are likeliest
    sampled = model.generate(
        torch.tensor(rows[:1]).expand(n, -1), attention_mask=torch.ones(n, len(rows[0])), do_sample=True,
        min_new_tokens=25, max_new_tokens=25,
    )[:, len(rows[0]) :]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "i like"}], user="b o|é/", tokenize=False)
    chat = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = tokenizer.convert_tokens_to_ids(first[1])
    is_right = chat == [1, *range(start, start + 3), 14, 15]
    print(json.dumps([family, difference, sampled.numel(), int((sampled >= given["logits"].shape[-1]).sum()), is_right]))
"""


@pytest.fixture(autouse=True)
def _families(monkeypatch):
    for family, config in CONFIGS_HERE.items():
        monkeypatch.setitem(CONFIGS, family, config)
    monkeypatch.setattr(token_mass, "NUM_NEW_TOKENS", 4)  # for time


def make_personalized(family="llama", lora=False, users=USERS, std=0.5):
    model = make_model(family)
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=LORA_TARGETS, r=4))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    torch.manual_seed(1)
    user_model = IndividualUserModel(UserModelConfig(num_users=len(users), num_virtual_tokens=T, token_dim=32))
    user_model.user_offsets.weight.data[1:].normal_(std=std)
    attach_user_model(model, user_model, UserVocab(users), bos_token_id=1)
    return model.eval()


def tokenizer_with_template(add_bos=False):
    tokenizer = make_tokenizer(add_bos)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@torch.no_grad()
def our_logits(model):
    ids = torch.tensor(PROMPTS)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), user_indices=torch.tensor(ROWS)).logits


def test_tokens_are_users_in_a_process_without_this_package(tmp_path):
    """The same logits, no token of a user among 10,000 that are sampled, and the chat template's `user`."""
    folders = {}
    for family in CONFIGS_HERE:
        folders[family] = str(tmp_path / family)
        model = make_personalized(family)
        torch.save({"ids": torch.tensor(PROMPTS), "logits": our_logits(model)}, folders[family] + ".pt")
        export_as_tokens(model, tokenizer_with_template(), folders[family], ["ann", "b o|é/"])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        input=json.dumps(folders),
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert [family for family, *_ in results] == list(CONFIGS_HERE)
    for family, difference, num_sampled, num_of_users, chat_is_right in results:
        assert difference < 1e-5, family
        assert (num_sampled, num_of_users) == (10_000 if family == "gpt2" else 100, 0), family
        assert chat_is_right


@pytest.mark.parametrize(
    ("family", "untie", "logits"),
    [("gptj", False, "bias"), ("llama", False, "mean"), ("gpt2", False, "tied"), ("gemma3", True, "mean")],
)
def test_probability_of_users_tokens_without_the_generation_config(family, untie, logits, tmp_path):
    export = export_as_tokens(make_personalized(family), make_tokenizer(), tmp_path / "out", untie=untie)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    num_tokens = T * (len(USERS) + 1)
    assert export.logits == logits
    assert model.config.tie_word_embeddings == (logits == "tied")
    assert model.generation_config.suppress_tokens == list(range(19, 19 + num_tokens))
    with torch.no_grad():
        last = model(torch.tensor(PROMPTS)).logits[:, -1]
    mass = last.softmax(dim=-1)[:, 19:].sum(dim=-1)
    if logits == "bias":
        assert mass.max() == export.mass.largest == 0
    elif logits == "mean":  # by Jensen's inequality, below that of a token drawn blindly
        torch.testing.assert_close(last[:, 19:], last[:, :19].mean(dim=-1, keepdim=True).expand(-1, num_tokens))
        assert mass.max() <= num_tokens / (19 + num_tokens)
        assert 0 < export.mass.mean <= export.mass.largest <= num_tokens / (19 + num_tokens)
    else:
        rows = model.transformer.wte.weight[19:]
        torch.testing.assert_close(rows[:T], make_personalized(family).user_model.generic_prompt.detach())
        assert export.mass.largest > 0.1


def test_mass_is_that_of_a_hand_computation(tmp_path):
    """A model whose own logits are all equal, with users' tokens of the same logit: 15 of 34 tokens."""
    model = make_personalized("llama")
    model.lm_head.weight.data.zero_()
    export = export_as_tokens(model, make_tokenizer(), tmp_path / "out")
    assert export.mass.mean == pytest.approx(15 / 34)
    assert export.mass.largest == pytest.approx(15 / 34)


def test_an_adapter_is_merged(tmp_path):
    model = make_personalized("llama", lora=True)
    expected = our_logits(model)
    export = export_as_tokens(model, make_tokenizer(), tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    users = [torch.arange(T) + export.first_token_id + T * row for row in ROWS]
    first, second = torch.tensor(PROMPTS[0]), torch.tensor(PROMPTS[1])
    rows = torch.stack([torch.cat([first[:1], users[0], first[1:]]), torch.cat([users[1], second])])
    with torch.no_grad():
        found = plain(rows).logits[:, T:, :19]
    torch.testing.assert_close(found, expected[:2], rtol=0, atol=1e-5)
    assert not list((tmp_path / "out").glob("adapter*"))


def test_names_are_escaped_and_collide_with_none(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|user=ann|0|>"])  # somebody's export, exported again
    model = make_personalized("llama")
    export = export_as_tokens(model, tokenizer, tmp_path / "out")
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    users = json.loads((tmp_path / "out" / "user_tokens.json").read_text())
    assert users["generic_user"] == "<|generic_user2|0|>"
    assert users["users"]["b o|é/"] == "<|user2=b%20o%7C%C3%A9%2F|0|>"
    firsts = exported.convert_tokens_to_ids([users["generic_user"], *users["users"].values()])
    assert firsts == [export.first_token_id + T * row for row in range(len(USERS) + 1)]
    assert export.first_token_id == 20  # behind the one that the model had no row for
    assert exported.decode([5, *range(20, 20 + T), 6], skip_special_tokens=True) == exported.decode([5, 6])


def test_a_model_with_more_rows_than_tokens_keeps_them_all(tmp_path):
    model = make_personalized("llama")
    model.resize_token_embeddings(24, mean_resizing=False)
    rows = model.get_input_embeddings().weight[:24].detach().clone()
    export = export_as_tokens(model, make_tokenizer(), tmp_path / "out", ["ann"])
    plain, tokenizer = (c.from_pretrained(tmp_path / "out") for c in (AutoModelForCausalLM, AutoTokenizer))
    assert export.first_token_id == 24
    assert len(tokenizer) == plain.config.vocab_size == 24 + 2 * T
    torch.testing.assert_close(plain.get_input_embeddings().weight[:24].detach(), rows, rtol=0, atol=0)
    assert plain.generation_config.suppress_tokens == list(range(24, 24 + 2 * T))


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        "\n  {{ messages[0]['content'] }}  \n\n",
        "{%- macro say(text) -%}[{{ text }}]{%- endmacro -%}{% set ns = namespace(n=0) %}"
        "{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ say(m['content']) }}{{ ns.n }}\n{% endfor %}\n"
        "  {% if true %} x{% endif %}",
        "{{ bos_token }}{{ messages[0]['content'] }}{% if add_generation_prompt %}>{% endif %}",
    ],
)
def test_a_template_says_what_it_said_behind_the_users_tokens(template):
    tokenizer, messages = make_tokenizer(), [{"role": "user", "content": "i {{ like }}"}]
    tokenizer.chat_template = template
    plain = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    names = {user: f"user={number}" for number, user in enumerate(USERS)}
    tokenizer.chat_template = with_users(template, names, "generic_user", 2, "<bos>")
    for user, name in [*names.items(), ("nobody", "generic_user"), (None, "generic_user"), (7, "generic_user")]:
        found = tokenizer.apply_chat_template(messages, user=user, tokenize=False, add_generation_prompt=True)
        position = len("<bos>") if plain.startswith("<bos>") else 0
        assert found == f"{plain[:position]}<|{name}|0|><|{name}|1|>{plain[position:]}"
    without = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "<|generic_user|0|><|generic_user|1|>" in without


def test_an_integer_is_the_user_of_that_name():
    text = jinja2.Template(with_users("Hi", {"7": "user=7"}, "generic_user", 1, None)).render(user=7)
    assert text == "<|user=7|0|>Hi"


def test_plain_text_is_read_alike_or_it_is_said(tmp_path, monkeypatch):
    with_bos = export_as_tokens(make_personalized("llama"), tokenizer_with_template(add_bos=True), tmp_path / "a")
    assert with_bos.layout_holds
    monkeypatch.setattr(token_mass, "PROMPTS", ("short answer",))
    monkeypatch.setattr(tokens_folder, "PROMPTS", ("short answer",))
    tokenizer = make_tokenizer()
    # a space in front of the text and of the text only, as sentencepiece's
    vocab = {word if word[0] == "<" else f"▁{word}": number for word, number in tokenizer.get_vocab().items()}
    tokenizer.backend_tokenizer.model = models.WordLevel({**vocab, "short": len(vocab)}, unk_token="<pad>")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    without = export_as_tokens(make_personalized("llama"), tokenizer, tmp_path / "b")
    assert not without.layout_holds


def test_scale_of_embeddings_is_found_or_refused():
    assert embedding_scale(make_model("gemma3")) == pytest.approx(32**0.5, rel=1e-6)
    assert embedding_scale(make_model("llama")) == 1.0
    model = make_model("llama")
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.tanh() + 1)
    with pytest.raises(ValueError, match="do more than multiply a row"):
        embedding_scale(model)


def test_the_table_for_vllm_is_what_the_model_puts_in(tmp_path):
    model = make_personalized("llama", lora=True)
    expected = model.user_model(torch.arange(len(USERS) + 1)).detach()
    logits = our_logits(model)
    manifest = export_for_vllm(model, make_tokenizer(), tmp_path / "out", made_from={"model": "here"})
    table = soft_prompt_table(tmp_path / "out")
    assert table.shape == (5, T, 32)
    for row in range(5):
        assert torch.equal(table[row], expected[row])
    assert torch.equal(table.rows([2, 0]), expected[[2, 0]])
    with pytest.raises(IndexError, match="no row 5 in a table of 5"):
        table[5]
    assert read_manifest(tmp_path / "out", format="vllm") == manifest
    assert UserVocab.from_pretrained(tmp_path / "out" / "users") == UserVocab(USERS)
    assert manifest.layout.bos_token_id == 1
    assert manifest.made_from == {"model": "here"}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    attach_user_model(plain, IndividualUserModel(UserModelConfig(4, T, 32)), UserVocab(USERS), 1)
    ids = torch.tensor(PROMPTS)
    with torch.no_grad():
        found = plain(input_ids=ids, attention_mask=torch.ones_like(ids), soft_prompts=table.rows(ROWS)).logits
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)


def test_an_adapter_may_stay_beside_its_base(tmp_path):
    model = make_personalized("gemma3", lora=True)
    base = {k: v.clone() for k, v in make_model("gemma3").state_dict().items()}
    manifest = export_for_vllm(model, make_tokenizer(), tmp_path / "out", keep_adapter=True)
    assert manifest.adapter_rank == 4
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, base[name]), name
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    embeddings = token_embedding_table(tmp_path / "out")
    assert torch.equal(embeddings.rows([3, 1]), plain.get_input_embeddings()(torch.tensor([[3, 1]]))[0])
    assert read_manifest(tmp_path / "out").files.keys() >= {"adapter/adapter_model.safetensors", "users/users.json"}


def test_a_folder_that_was_edited_is_refused(tmp_path):
    export_for_vllm(make_personalized("llama"), make_tokenizer(), tmp_path / "out")
    with pytest.raises(ValueError, match="exported as 'vllm'; needed is 'tokens'"):
        read_manifest(tmp_path / "out", format="tokens")
    with pytest.raises(FileNotFoundError, match="no exported model"):
        read_manifest(tmp_path)
    users = tmp_path / "out" / "users" / "users.json"
    users.write_text(users.read_text().replace("ann", "zoe"))
    with pytest.raises(ValueError, match="users.json is not the file that was exported"):
        read_manifest(tmp_path / "out")
    manifest = tmp_path / "out" / "export.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(ValueError, match="another version than 1"):
        read_manifest(tmp_path / "out")


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="no user model attached"):
        export_as_tokens(make_model("llama"), tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match="1 of 2 users are not in the model, such as 'nobody'"):
        export_as_tokens(make_personalized(), tokenizer, tmp_path / "out", ["ann", "nobody"])
    with pytest.raises(TypeError, match="must be a list of user ids"):
        export_as_tokens(make_personalized(), tokenizer, tmp_path / "out", "ann")
    with pytest.raises(ValueError, match="no adapter to keep"):
        export_for_vllm(make_personalized(), tokenizer, tmp_path / "out", keep_adapter=True)
    model = make_personalized()
    model.user_profile_template = "About: {profile}"
    with pytest.raises(ValueError, match="trained with profiles"):
        export_for_vllm(model, tokenizer, tmp_path / "out")
    model = make_personalized()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="quantized"):
        export_as_tokens(model, tokenizer, tmp_path / "out")
    monkeypatch.setattr(tokens_folder, "MAX_USER_TOKENS", 14)
    with pytest.raises(ValueError, match="4 users and the generic one, with 3 virtual tokens each, are 15 tokens"):
        export_as_tokens(make_personalized(), tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(ValueError, match="not empty"):
        export_for_vllm(make_personalized(), tokenizer, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "it is DoRA"),
        ({"bias": "all"}, "trains biases"),
        ({"modules_to_save": ["lm_head"]}, "modules of its own"),
        ({"rank_pattern": {"q_proj": 2}}, "ranks or scales"),
        ({"target_modules": ["embed_tokens"]}, "embeddings"),
    ],
)
def test_an_adapter_that_vllm_does_not_compute_is_refused(options, reason, tmp_path):
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": LORA_TARGETS, "r": 4} | options)
    model = get_peft_model(make_model("llama"), config)
    attach_user_model(model, IndividualUserModel(UserModelConfig(1, T, 32)), UserVocab(["ann"]), 1)
    with pytest.raises(ValueError, match=f"{reason}.*Leave out `keep_adapter`"):
        export_for_vllm(model, make_tokenizer(), tmp_path / "out", keep_adapter=True)


def test_the_command_line_exports(tmp_path, capsys, model_dirs):
    model = make_personalized("llama")
    model.save_pretrained(tmp_path / "trained")
    make_tokenizer(True).save_pretrained(tmp_path / "trained")
    trained, out = str(tmp_path / "trained"), str(tmp_path / "tokens")
    assert main(["export", trained, "--format", "tokens", "--users", "ann", "--output_dir", out]) == 0
    told = capsys.readouterr().out
    assert "1 users and the generic one are 6 tokens, from id 19 on" in told
    assert "the next token is one of them with probability" in told
    assert "no chat template" in told
    assert read_manifest(out).made_from["language_model_files"].keys() == {"config.json", "model.safetensors"}
    assert main(["export", trained, "--format", "vllm", "--output_dir", str(tmp_path / "vllm")]) == 0
    assert "python -m trl_personal.serving" in capsys.readouterr().out
    assert main(["export", trained, "--format", "vllm", "--users", "ann", "--output_dir", str(tmp_path / "x")]) == 1
    assert "--users is no option of --format vllm" in capsys.readouterr().err
    assert main(["export", trained, "--format", "tokens", "--keep_adapter", "--output_dir", str(tmp_path / "x")]) == 1
    assert "--keep_adapter is no option of --format tokens" in capsys.readouterr().err
    assert main(["export", trained, "--format", "tokens", "--output_dir", out]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert ROOT.exists()
    assert AutoPersonalizedModelForCausalLM.from_pretrained(trained).user_vocab == UserVocab(USERS)
