"""Text about users: in the prompt of the user's term, and nowhere else."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, make_tokenizer
from datasets import Dataset
from test_loss import BETA, disturb, log_prob_by_hand, reference_log_probs_by_hand, soft_prompt_by_hand
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from trl_personal import AutoPersonalizedModelForCausalLM, PersonalizedDPOConfig, render_user_profile
from trl_personal.cli.app import main
from trl_personal.evaluation import answers_by_user, evaluate_model, score_pairs
from trl_personal.evaluation.answers import GENERIC_USER
from trl_personal.evaluation.scoring import with_row_numbers
from trl_personal.models.saving import get_base_model
from trl_personal.user_profile import insert_profile_ids


TEMPLATE = "please {profile} and"  # words of the tests' tokenizer
PROFILES = {"ann": "like dogs", "bo": "like cats cats"}
SETTINGS = {"user_profile_column": "about", "user_profile_template": TEMPLATE, "beta": BETA}
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}and {{ m.content }} and {% elif m.role == 'user' %}{{ m.content }} "
    "{% else %}answer {{ m.content }} <eos> {% endif %}{% endfor %}{% if add_generation_prompt %}answer {% endif %}"
)


@pytest.fixture
def profiled(preferences):
    """The preferences with a profile in all rows but the last two."""
    about = [PROFILES[user_id] for user_id in preferences["user_id"]]
    return preferences.add_column("about", [*about[:6], None, "  "])


@pytest.fixture
def chats(profiled):
    """The same as conversations, every second one with a system turn of its own."""
    rows = []
    for i, row in enumerate(profiled):
        system = [{"role": "system", "content": "short answer"}] if i % 4 < 2 else []
        answers = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
        rows.append({**row, **answers, "prompt": [*system, {"role": "user", "content": row["prompt"]}]})
    return Dataset.from_list(rows)


@pytest.fixture
def train(make_trainer, profiled):
    def make(family="gptj", dataset=profiled, **kwargs):
        inputs = {"train_dataset": dataset, **kwargs.pop("trainer_kwargs", {})}
        return make_trainer(family, trainer_kwargs=inputs, **{**SETTINGS, **kwargs})

    return make


def loss_by_hand(trainer, examples, user_prompts, alpha):
    """The user's term on `user_prompts`, the generic term and the reference on the plain ones."""
    causal_lm, vocab = get_base_model(trainer.model), list(trainer.user_vocab)
    references = reference_log_probs_by_hand(trainer, examples)
    losses = []
    for example, user_prompt, (ref_chosen, ref_rejected) in zip(examples, user_prompts, references, strict=True):
        user = vocab.index(example["user_id"]) + 1
        for row, prompt, weight in ((user, user_prompt, alpha), (0, example["prompt_ids"], 1 - alpha)):
            e = soft_prompt_by_hand(trainer.user_model, row)
            chosen = log_prob_by_hand(causal_lm, prompt, example["chosen_ids"], e)
            rejected = log_prob_by_hand(causal_lm, prompt, example["rejected_ids"], e)
            losses.append(-weight * F.logsigmoid(BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))))
    return torch.stack(losses).sum() / len(examples)


@pytest.mark.parametrize(("family", "lora"), [("gptj", False), ("llama", True)])
def test_loss_equals_a_computation_by_hand(train, profiled, family, lora):
    trainer = train(family, lora=lora, personalization_alpha=0.7)
    disturb(trainer)
    examples = [trainer.train_dataset[i] for i in range(8)]
    tokenizer = make_tokenizer(add_bos=family == "llama")
    prompts = [
        tokenizer(f"please {row['about']} and\n{row['prompt']}" if (row["about"] or "").strip() else row["prompt"])
        for row in profiled
    ]
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    expected = loss_by_hand(trainer, examples, [prompt["input_ids"] for prompt in prompts], 0.7)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    without = loss_by_hand(trainer, examples, [e["prompt_ids"] for e in examples], 0.7)
    assert abs(loss - without) > 1e-3


def test_rows_of_a_batch_with_profiles(train):
    trainer = train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (0, 6)])
    tokenizer = make_tokenizer()
    texts = ["please like dogs and please write a story yes <eos>", "the story yes <eos>"]
    for row, text in enumerate(texts):
        ids, mask = batch["user_input_ids"][row], batch["user_attention_mask"][row].bool()
        assert tokenizer.decode(ids[mask]) == text
        completion = batch["user_completion_mask"][row].bool()
        assert ids[completion].tolist() == batch["input_ids"][row][batch["completion_mask"][row].bool()].tolist()
    assert (
        tokenizer.decode(batch["input_ids"][0][batch["attention_mask"][0].bool()]) == "please write a story yes <eos>"
    )


def test_without_any_profile_the_training_is_that_without_the_column(train, preferences):
    nothing = preferences.add_column("about", [None] * 8)
    runs = [train(dataset=nothing), train(dataset=preferences, user_profile_column=None)]
    for trainer in runs:
        trainer.train()
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("variant", ["precomputed", "stream"])
def test_precomputed_references_and_streams_train_the_same(train, profiled, variant, preferences):
    order = {"shuffle_dataset": False} if "shuffle_dataset" in PersonalizedDPOConfig.__dataclass_fields__ else {}
    same = {"max_steps": 3, "optim": "sgd", "per_device_train_batch_size": 8, **order}
    plain = train(**same)
    if variant == "precomputed":
        other = train(**same, precompute_ref_log_probs=True)
        unprofiled = train(dataset=preferences, user_profile_column=None, precompute_ref_log_probs=True)
        assert other.train_dataset["ref_chosen_logps"] == unprofiled.train_dataset["ref_chosen_logps"]
    else:
        other = train(dataset=profiled.to_iterable_dataset(), **same)
    for trainer in (plain, other):
        trainer.train()
    for one, two in zip(plain.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def chat_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_a_conversation_gets_a_system_turn_or_a_longer_one(train, chats):
    tokenizer = chat_tokenizer()
    trainer = train(dataset=chats, trainer_kwargs={"processing_class": tokenizer})
    texts = {i: tokenizer.decode(trainer.train_dataset[i]["user_prompt_ids"]) for i in (0, 2, 6)}
    assert texts[0] == "and short answer please like dogs and and please write a story answer"
    assert texts[2] == "and please like dogs and and write a answer and answer"
    assert texts[6] == "the story answer"
    assert tokenizer.decode(trainer.train_dataset[2]["prompt_ids"]) == "write a answer and answer"
    disturb(trainer)
    examples = [trainer.train_dataset[i] for i in range(8)]
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    expected = loss_by_hand(trainer, examples, [e["user_prompt_ids"] for e in examples], 0.5)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_implicit_prompts_are_found_first(train, chats):
    rows = [
        {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
        | {"user_id": row["user_id"], "about": row["about"]}
        for row in chats
    ]
    tokens = [
        train(dataset=dataset, trainer_kwargs={"processing_class": chat_tokenizer()}).train_dataset
        for dataset in (chats, Dataset.from_list(rows))
    ]
    for name in ("prompt_ids", "user_prompt_ids", "chosen_ids"):
        assert tokens[0][name] == tokens[1][name]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHAT_TEMPLATE.replace("and {{ m.content }} and ", ""), "leaves the system turn out"),
        (
            CHAT_TEMPLATE.replace("and {{ m.content }} and ", "{{ raise_exception('no system here') }}"),
            "refuses a system turn, which is where a profile goes .no system here.",
        ),
        (
            CHAT_TEMPLATE.replace(
                "answer {{ m", "answer {% if messages[0].role == 'system' %}yes {% endif %}{{ m"
            ),
            "has other tokens than behind the prompt alone",
        ),
    ],
    ids=["left-out", "refused", "answers-change"],
)  # fmt: skip
def test_chat_templates_that_cannot_show_a_profile_are_refused(train, chats, template, message):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    chats = chats.filter(lambda row: row["prompt"][0]["role"] != "system")
    with pytest.raises(ValueError, match=message):
        train(dataset=chats, trainer_kwargs={"processing_class": tokenizer})


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
def test_truncation_takes_from_the_answer_what_it_takes_without_a_profile(train, truncation_mode):
    """The profile is never cut, and does not count."""
    trainer = train(max_length=6, truncation_mode=truncation_mode)
    tokenizer = make_tokenizer()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    assert batch["input_ids"].shape[1] == 6
    for row in range(16):
        plain, mask = batch["input_ids"][row], batch["completion_mask"][row].bool()
        user_row, user_mask = batch["user_input_ids"][row], batch["user_completion_mask"][row].bool()
        assert user_row[user_mask].tolist() == plain[mask].tolist()
        extra = {0: 4, 1: 5}[row % 2] if row % 8 < 6 else 0
        kept = tokenizer.decode(user_row[batch["user_attention_mask"][row].bool()][extra:])
        assert kept == tokenizer.decode(plain[batch["attention_mask"][row].bool()])


def test_a_profile_that_fills_max_length_is_refused(train):
    with pytest.raises(ValueError, match=r"A profile alone has 5 tokens and fills `max_length` .5."):
        train(max_length=5)


def test_positions_are_enough_for_profiles_too(train, profiled):
    rows = [{**row, "about": "dogs " * 40} for row in profiled]
    with pytest.raises(ValueError, match=r"can need 50 for text and 3 for the soft prompt, and 42 for a profile"):
        train(dataset=Dataset.from_list(rows), max_length=50)


def test_bad_columns_and_templates_are_refused_early(train, profiled, make_args):
    with pytest.raises(ValueError, match="The train dataset has no `about` column; found"):
        train(dataset=profiled.remove_columns("about"))
    with pytest.raises(ValueError, match="The eval dataset has no `about` column"):
        train(trainer_kwargs={"eval_dataset": profiled.remove_columns("about")})
    with pytest.raises(
        TypeError, match=r"Column `about` of the train dataset must hold text \(or `None`\), found int64"
    ):
        train(dataset=profiled.remove_columns("about").add_column("about", [1] * 8))
    with pytest.raises(ValueError, match="compute_metrics"):
        train(trainer_kwargs={"compute_metrics": lambda prediction: {}})
    for template in ("no place", "{profile} {name}", "{profile", "{}"):
        with pytest.raises(ValueError, match="`user_profile_template` must have `{profile}`"):
            make_args(user_profile_template=template)
    with pytest.raises(TypeError, match="must be text .or `None`., found int"):
        render_user_profile("why", 7)


def test_text_that_starts_with_bos_keeps_it_in_front():
    assert render_user_profile("<bos> why", "a child", bos_token="<bos>") == "<bos>User profile: a child\n why"
    assert render_user_profile("why", None) == render_user_profile("why", " \n") == "why"
    braces = render_user_profile("why", "likes {curly} braces", "{{it}} {profile}")
    assert braces == "{it} likes {curly} braces\nwhy"


def test_system_turns_in_parts_get_one_more():
    parts = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}]
    (turn,) = render_user_profile(parts, "a child")
    assert turn["content"] == [*parts[0]["content"], {"type": "text", "text": "User profile: a child"}]
    assert len(parts[0]["content"]) == 1


def test_plain_dpo_ignores_profiles_and_says_so(train, caplog):
    with caplog.at_level(logging.WARNING, "trl_personal"):
        trainer = train(user_model_kind="none")
    assert "`user_profile_column` is ignored" in caplog.text
    assert "user_prompt_ids" not in trainer.train_dataset.column_names


def test_swapped_and_opposite_take_the_other_users_profile_along(train, profiled):
    vocab = ["ann", "zoe", "bo"]  # nothing is known of zoe, who has no row
    blank_first = Dataset.from_list([{**profiled[1], "about": " "}, *profiled])
    trainer = train(trainer_kwargs={"user_vocab": vocab, "eval_dataset": {"pairs": with_row_numbers(blank_first)}})
    disturb(trainer)
    assert "eval_users/accuracy_swapped_soft_prompt" in trainer.evaluate(profiled)
    scored = score_pairs(trainer, blank_first, opposite_users={"ann": "bo", "bo": "ann"})
    other = {"ann": "bo", "bo": "ann"}
    swapped = [
        {**row, "user_id": other[row["user_id"]], "about": PROFILES.get(other[row["user_id"]])} for row in blank_first
    ]
    expected = score_pairs(trainer, Dataset.from_list(swapped)).margins["own"]
    np.testing.assert_allclose(scored.margins["swapped"], expected, atol=1e-5)
    np.testing.assert_allclose(scored.margins["opposite"], expected, atol=1e-5)
    prompt_alone = [{**row, "user_id": other[row["user_id"]]} for row in blank_first]
    assert not np.allclose(expected, score_pairs(trainer, Dataset.from_list(prompt_alone)).margins["own"], atol=1e-3)
    by_name = score_pairs(trainer, "pairs", opposite_users={"ann": "bo", "bo": "ann"})
    for name in ("own", "generic", "swapped", "opposite"):
        np.testing.assert_allclose(by_name.margins[name], scored.margins[name], atol=1e-5)
    with pytest.raises(ValueError, match="have no row in the dataset, so that no profile is known .*'zoe'"):
        score_pairs(trainer, profiled, opposite_users={"ann": "zoe", "bo": "ann"})
    of_ann = score_pairs(trainer, profiled.filter(lambda row: row["user_id"] == "ann"))
    assert list(of_ann.margins) == ["own", "generic"]  # no other user's profile is known


@pytest.fixture
def saved(train, tmp_path):
    trainer = train("llama")
    disturb(trainer)
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    return folder


def test_answers_are_those_to_the_rendered_prompt(saved):
    model = AutoPersonalizedModelForCausalLM.from_pretrained(saved)
    assert model.user_profile_template == TEMPLATE
    tokenizer = make_tokenizer(add_bos=True)
    options = {"max_new_tokens": 5, "do_sample": False}
    answers = answers_by_user(
        model, tokenizer, ["the story", "short"], ["ann", None], user_profiles=PROFILES, **options
    )
    for prompt, expected in (("please like dogs and\nthe story", 0), ("please like dogs and\nshort", 1)):
        inputs = tokenizer([prompt], return_tensors="pt")
        ids = model.generate(**inputs, user_ids="ann", **options)[0, inputs["input_ids"].shape[1] :]
        assert answers["ann"][expected] == tokenizer.decode(ids, skip_special_tokens=True)
    plain = answers_by_user(model, tokenizer, ["the story", "short"], ["ann", None], **options)
    assert (plain[None], plain["ann"] != answers["ann"]) == (answers[None], True)


def test_command_line_takes_a_file_of_profiles(saved, tmp_path, capsys):
    (tmp_path / "about.json").write_text(json.dumps(PROFILES))
    command = ["generate", "--model", str(saved), "--users", "ann,bo", "--format", "jsonl", "--max_new_tokens", "5"]
    printed = []
    for arguments in (
        ["--prompt", "the story", "--user_profiles", str(tmp_path / "about.json")],
        ["--prompt", "please like dogs and\nthe story"],
    ):
        assert main([*command, *arguments]) == 0
        printed.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert printed[0][0]["prompt"] == "the story"
    assert printed[0][0]["text"] == printed[1][0]["text"]
    (tmp_path / "about.json").write_text('{"ann": 3}')
    assert main([*command, "--prompt", "yes", "--user_profiles", str(tmp_path / "about.json")]) == 1
    assert "must be a JSON object with a text (or null) for each user id" in capsys.readouterr().err


CHATML = (
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
CHAT_TEMPLATES = {
    "a header for each message": CHATML,
    "a default system turn": "{% if messages[0].role != 'system' %}<bos>system\nBe kind.<eos>\n{% endif %}" + CHATML,
    "no headers": CHAT_TEMPLATE,
    "system turn inside the first message": (
        "<bos>{% for m in messages %}{% if m.role == 'system' %}[INST] {{ m.content }}\n\n{% elif m.role == 'user' %}"
        "{% if loop.index0 == 0 or loop.previtem.role != 'system' %}[INST] {% endif %}{{ m.content }} [/INST]"
        "{% else %} {{ m.content }}<eos>{% endif %}{% endfor %}"
    ),
}
CONVERSATIONS = {
    "one message": [{"role": "user", "content": "Why?"}],
    "two turns": [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "And\nyou?"},
    ],
    "a system turn": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
}


@pytest.fixture
def byte_tokenizer():
    """Text and ids are one-to-one."""
    core = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


@pytest.mark.parametrize("chat_template", CHAT_TEMPLATES.values(), ids=CHAT_TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_profile_in_ids_is_the_one_in_messages(byte_tokenizer, chat_template, messages):
    byte_tokenizer.chat_template = chat_template

    def encode(messages):
        return byte_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    with_profile = render_user_profile(messages, "Second text.", TEMPLATE)
    if "[INST]" in chat_template and messages[0]["role"] == "system":  # is not told from the message there
        with_profile[0]["content"] = "please Second text. and\n\nBe brief."
    expected = encode(with_profile)
    assert insert_profile_ids(encode(messages), "Second text.", TEMPLATE, byte_tokenizer) == expected
    for nothing in (None, " "):
        assert insert_profile_ids(encode(messages), nothing, TEMPLATE, byte_tokenizer) == encode(messages)


@pytest.mark.parametrize("chat_template", [None, CHATML])
@pytest.mark.parametrize("bos", ["", "<bos>"])
def test_profile_in_ids_of_plain_text_is_the_first_line(byte_tokenizer, chat_template, bos):
    byte_tokenizer.chat_template = chat_template
    ids = byte_tokenizer(f"{bos}Why is\nthat?")["input_ids"]
    found = insert_profile_ids(ids, " Five years old.", "Note: {profile}", byte_tokenizer)
    assert found == byte_tokenizer(f"{bos}Note: Five years old.\nWhy is\nthat?")["input_ids"]


def test_profiles_that_cannot_be_put_into_ids_are_refused(byte_tokenizer):
    last = "{% for m in messages[1:] %}[{{ m.content }}]{% endfor %}{{ messages[0].content }}"
    byte_tokenizer.chat_template = last
    with pytest.raises(ValueError, match="does not write a system turn in front"):
        insert_profile_ids([40], "Five.", TEMPLATE, byte_tokenizer)
    words = make_tokenizer()
    with pytest.raises(ValueError, match="makes other ids of the text"):
        insert_profile_ids([3, 0, 99], "like dogs", TEMPLATE, words)


def test_generation_takes_profiles_of_rows(saved):
    model, tokenizer = AutoPersonalizedModelForCausalLM.from_pretrained(saved), make_tokenizer(add_bos=True)
    prompts, users, about = (
        ["the story", "short", "yes i like cats"],
        ["ann", "bo", None],
        ["like dogs", None, "like cats"],
    )
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    options = {"user_ids": users, "do_sample": False, "repetition_penalty": 1.3}
    found = model.generate(**inputs, user_profiles=about, tokenizer=tokenizer, max_new_tokens=6, **options)
    rendered = [render_user_profile(*row, TEMPLATE) for row in zip(prompts, about, strict=True)]
    in_text = tokenizer(rendered, padding=True, return_tensors="pt")
    expected = model.generate(**in_text, max_new_tokens=6, **options)[:, in_text["input_ids"].shape[1] :]
    assert in_text["input_ids"].shape[1] > inputs["input_ids"].shape[1]
    torch.testing.assert_close(found, torch.cat([inputs["input_ids"], expected], dim=1))
    plain = model.generate(**inputs, max_new_tokens=6, **options)
    assert not torch.equal(plain[0], found[0])
    assert torch.equal(plain[1], found[1])

    options["max_length"] = inputs["input_ids"].shape[1] + 6
    torch.testing.assert_close(
        model.generate(**inputs, user_profiles=about, tokenizer=tokenizer, **options), found
    )  # lengths are the caller's
    one = model.generate(**inputs, user_profiles="like dogs", tokenizer=tokenizer, **options)
    three = model.generate(**inputs, user_profiles=["like dogs"] * 3, tokenizer=tokenizer, **options)
    assert torch.equal(one, three)


def test_a_pipeline_takes_profiles(saved):
    model, tokenizer = AutoPersonalizedModelForCausalLM.from_pretrained(saved), make_tokenizer(add_bos=True)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=5, do_sample=False)
    found = write("the story", user_ids="ann", user_profiles="like dogs", tokenizer=tokenizer, return_full_text=False)
    inputs = tokenizer(render_user_profile("the story", "like dogs", TEMPLATE), return_tensors="pt")
    ids = model.generate(**inputs, user_ids="ann", max_new_tokens=5, do_sample=False)
    expected = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found[0]["generated_text"].split() == expected.split()


def test_profiles_at_generation_are_checked(saved):
    model, tokenizer = AutoPersonalizedModelForCausalLM.from_pretrained(saved), make_tokenizer(add_bos=True)
    inputs = tokenizer(["the story", "yes short"], return_tensors="pt")
    with pytest.raises(ValueError, match="needs `tokenizer=`"):
        model.generate(**inputs, user_profiles=["like dogs", None])
    with pytest.raises(ValueError, match="has 1 texts for a batch of 2 rows"):
        model.generate(**inputs, user_profiles=["like dogs"], tokenizer=tokenizer)


def test_a_model_without_profiles_refuses_them(make_trainer, tokenizer):
    trainer = make_trainer()
    assert trainer.model.user_profile_template is None
    with pytest.raises(ValueError, match="trained without profiles"):
        answers_by_user(trainer.model, tokenizer, ["the story"], ["ann"], user_profiles=PROFILES)
    inputs = tokenizer(["the story"], return_tensors="pt")
    with pytest.raises(ValueError, match="trained without profiles"):
        trainer.model.generate(**inputs, user_ids=["ann"], user_profiles=["like dogs"])


def test_evaluated_answers_are_to_prompts_with_profiles(saved, profiled, model_dirs):
    options = {"max_new_tokens": 5, "do_sample": False}
    blank_first = profiled.select([7, *range(7)])  # a row without the profile that others of the user have
    evaluation = evaluate_model(
        str(saved),
        blank_first,
        ref_model=model_dirs["llama"],
        num_generate=2,
        generate_kwargs=options,
        disable_tqdm=True,
    )
    model, tokenizer = AutoPersonalizedModelForCausalLM.from_pretrained(saved), make_tokenizer(add_bos=True)
    prompts = [sample["prompt"] for sample in evaluation.samples]
    found = {
        user: [sample["answers"][user or GENERIC_USER] for sample in evaluation.samples]
        for user in ("ann", "bo", None)
    }
    expected = answers_by_user(model, tokenizer, prompts, ["ann", "bo", None], user_profiles=PROFILES, **options)
    assert found == expected
    assert expected != answers_by_user(model, tokenizer, prompts, ["ann", "bo", None], **options)


def test_a_resumed_run_equals_a_straight_one(train):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    straight = train(**settings)
    straight.train()
    expected = copy.deepcopy(straight.model.state_dict())
    resumed = train(**settings)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
    for name, tensor in resumed.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_the_plain_model_has_no_template():
    assert not hasattr(make_model(), "user_profile_template")
