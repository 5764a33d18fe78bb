"""What few calls reach: other orders of users, failed calls, files of two saves, keys of the precomputed reference."""

import json
import os
import shutil

import pytest
import torch
from conftest import make_model, make_tokenizer
from datasets import Dataset
from families import make_family
from peft import LoraConfig, get_peft_model
from test_loss import batch_of, disturb, log_prob_by_hand, soft_prompt_by_hand
from transformers import AutoModelForCausalLM, DynamicCache, TrainerCallback
from trl import DPOTrainer

from trl_personal import (
    AutoPersonalizedModelForCausalLM,
    IndividualUserModel,
    LowRankUserModel,
    LowRankUserModelConfig,
    UserModelConfig,
    UserVocab,
    attach_user_model,
    detach_user_model,
    files,
)
from trl_personal.models.loading import check_fingerprints
from trl_personal.training.reference_cache import rows_fingerprint
from trl_personal.user_models.initialization import soft_prompt_drawer


NUM_VIRTUAL_TOKENS = 3
BOS, EOS = 1, 2


def personalize(model, **kwargs):
    torch.manual_seed(5)
    user_model = IndividualUserModel(UserModelConfig(2, NUM_VIRTUAL_TOKENS, 32))
    user_model.generic_prompt.data.normal_()
    user_model.user_offsets.weight.data[1:].normal_()
    attach_user_model(model, user_model, UserVocab(["ann", "bo"]), **kwargs)
    return model


IDS = torch.tensor([[BOS, 5, 6, 7]])
ANN = torch.tensor([1])
REAL = [0, 4, 5, 6]  # columns of `IDS` with the soft prompt of three after BOS
PREDICTING = [3, 4, 5, 6]  # BOS is represented by the last virtual token


def embeddings_by_hand(model, user=1):
    """`IDS` with the soft prompt in, `(1, 7, 32)`, for a call without users."""
    embeds = model.get_input_embeddings()(IDS[0])
    offset = model.user_model.user_offsets.weight[user].view(NUM_VIRTUAL_TOKENS, -1)
    return torch.cat([embeds[:1], model.user_model.generic_prompt + offset, embeds[1:]])[None]


# --- Users in another order -------------------------------------------------------------------------------------------


def test_vocabularies_are_equal_in_the_same_order_only():
    assert UserVocab(["ann", "bo"]) == UserVocab(["ann", "bo"])
    assert UserVocab(["ann", "bo"]) != UserVocab(["bo", "ann"])


def test_rows_of_a_saved_vocabulary_are_its_numbers_and_not_the_order_of_the_file(tmp_path):
    (tmp_path / "users.json").write_text('{"bo": 2, "cy": 3, "ann": 1}')
    vocab = UserVocab.from_pretrained(tmp_path)
    assert list(vocab) == ["ann", "bo", "cy"]
    assert vocab.encode(["bo", "cy", "ann"]) == [2, 3, 1]


def test_users_are_collected_in_order_of_first_appearance(make_trainer, preferences):
    trainer = make_trainer(trainer_kwargs={"train_dataset": preferences.select([1, 3, 0, 2])})
    assert list(trainer.user_vocab) == ["bo", "ann"]


def test_known_users_keep_their_soft_prompts_where_new_data_has_another_order(make_trainer, preferences, tmp_path):
    first = make_trainer()
    first.train()
    first.save_model(str(tmp_path / "first"))
    rows = Dataset.from_list([{**preferences[0], "user_id": "cy"}, preferences[1], preferences[0]])
    second = make_trainer(trainer_kwargs={"model": str(tmp_path / "first"), "train_dataset": rows})
    assert list(second.user_vocab) == ["ann", "bo", "cy"]
    for user_id in ("ann", "bo"):
        was, now = (
            trainer.user_model(torch.tensor(trainer.user_vocab.encode([user_id]))) for trainer in (first, second)
        )
        assert torch.equal(was, now)


# --- Initial prompts --------------------------------------------------------------------------------------------------


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


def test_prompts_start_from_tokens_and_not_from_padding_of_the_embedding_table(make_trainer, tmp_path):
    model, tokenizer = make_model(), make_tokenizer()
    model.resize_token_embeddings(512, mean_resizing=False)
    model.get_input_embeddings().weight.data[len(tokenizer) :] = 1000.0
    model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    trainer = make_trainer(num_virtual_tokens=8, trainer_kwargs={"model": str(tmp_path / "wide")})
    assert trainer.user_model.generic_prompt.abs().max() < 100


@pytest.mark.parametrize("kind", ["individual", "cluster"])
def test_making_users_does_not_move_the_global_generator(make_trainer, kind):
    states = []
    for user_model_kind in (kind, "none"):
        make_trainer(user_model_kind=user_model_kind)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_position_of_the_soft_prompt_is_that_of_the_tokenizers_bos(make_trainer, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "short"  # 3; the model's config says 1
    trainer = make_trainer(trainer_kwargs={"processing_class": tokenizer})
    trainer.save_model(str(tmp_path / "final"))
    config = json.loads((tmp_path / "final/user_model/user_model_config.json").read_text())
    assert config["bos_token_id"] == 3


def test_a_user_model_of_half_precision_is_trained_in_float32(make_trainer):
    user_model = IndividualUserModel(UserModelConfig(2, 3, 32)).to(torch.bfloat16)
    trainer = make_trainer(trainer_kwargs={"user_model": user_model})
    assert {parameter.dtype for parameter in trainer.user_model.parameters()} == {torch.float32}


# --- Outputs of a conditioned call ------------------------------------------------------------------------------------


def test_attentions_are_from_predicting_columns_to_real_tokens():
    model = personalize(make_model("llama"))
    model.set_attn_implementation("eager")
    by_hand = model(inputs_embeds=embeddings_by_hand(model), output_attentions=True).attentions
    found = model(IDS, user_indices=ANN, output_attentions=True).attentions
    assert len(found) == 2
    for layer, expected in zip(found, by_hand, strict=True):
        torch.testing.assert_close(layer, expected[:, :, PREDICTING][:, :, :, REAL])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_router_logits_are_those_of_the_real_tokens(family):
    model = personalize(make_family(family))
    by_hand = model(inputs_embeds=embeddings_by_hand(model), output_router_logits=True).router_logits
    found = model(IDS, user_indices=ANN, output_router_logits=True).router_logits
    for layer, expected in zip(found, by_hand, strict=True):
        torch.testing.assert_close(layer, expected[REAL])


def test_virtual_tokens_have_token_type_zero():
    model = personalize(make_model("gptj"))  # adds the embedding of the token type
    types = torch.tensor([[4, 5, 4, 5]])
    by_hand = model(
        inputs_embeds=embeddings_by_hand(model), token_type_ids=torch.tensor([[4, 0, 0, 0, 5, 4, 5]])
    ).logits
    found = model(IDS, token_type_ids=types, user_indices=ANN).logits
    torch.testing.assert_close(found, by_hand[:, PREDICTING])


# --- Calls that fail, hooks -------------------------------------------------------------------------------------------


def out_of_memory(*args, **kwargs):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("where", ["language model", "layer"])
def test_the_call_after_a_failed_one_is_plain(monkeypatch, where):
    model = personalize(make_model("llama"))
    expected = model(IDS).logits
    module = model if where == "language model" else model.get_decoder().layers[-1]
    with monkeypatch.context() as patch:
        patch.setattr(module, "forward", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(IDS, user_indices=ANN)
    assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model(IDS, use_cache=False).logits, expected)


def test_a_model_that_does_not_call_its_decoder_is_named(monkeypatch):
    model = personalize(make_model("llama"))
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: torch.zeros(1))
    assert torch.equal(model(IDS), torch.zeros(1))
    with pytest.raises(RuntimeError, match="LlamaForCausalLM does not call its decoder as a module"):
        model(IDS, user_indices=ANN)


def test_no_hook_stays_after_detaching():
    model = personalize(make_model("llama"))
    user_model, vocab = detach_user_model(model)
    attach_user_model(
        model, user_model, vocab, bos_token_id=7
    )  # rows that start with 1 have the soft prompt first now
    found = model(IDS, user_indices=ANN).logits
    torch.testing.assert_close(
        found, personalize(make_model("llama"), bos_token_id=7)(IDS, user_indices=ANN).logits, rtol=0, atol=0
    )
    assert not torch.allclose(found, personalize(make_model("llama"))(IDS, user_indices=ANN).logits)


def test_calls_that_cannot_be_conditioned_are_refused():
    model = personalize(make_model("llama"))
    with pytest.raises(ValueError, match=r"one user per row, shape \(1,\), got \(2,\)"):
        model(IDS, user_indices=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"`attention_mask` of the shape of `input_ids`, \(1, 4\)"):
        model(IDS, attention_mask=torch.ones(1, 1, 4, 4), user_indices=ANN)
    cache = DynamicCache(config=model.config)
    model(IDS, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="cannot continue from a cache"):
        model(IDS, past_key_values=cache, user_indices=ANN)
    with pytest.raises(ValueError, match="needs `input_ids`"):
        model(inputs_embeds=embeddings_by_hand(model), user_indices=ANN)


# --- Generation -------------------------------------------------------------------------------------------------------


def test_min_length_counts_text_only():
    model = personalize(make_model("gptj"))
    model.get_output_embeddings().bias.data[EOS] = 1000.0  # stops as soon as it may
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    for min_length, length in ((0, 5), (9, 10)):
        sequence = model.generate(**inputs, user_ids="ann", min_length=min_length, max_length=20, do_sample=False)
        assert sequence.shape == (1, length)
        assert sequence[0, -1] == EOS


def test_eos_in_a_prompt_is_text_where_padding_has_the_same_id():
    model = personalize(make_model("llama"))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = EOS
    ids = torch.tensor([[BOS, 5, EOS, 6, 7]])
    options = {
        "user_ids": "ann",
        "max_new_tokens": 1,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    without = model.generate(ids, **options).scores[0]
    torch.testing.assert_close(without, model.generate(ids, attention_mask=torch.ones_like(ids), **options).scores[0])
    hidden = model.generate(ids, attention_mask=ids.ne(EOS).long(), **options).scores[0]
    assert not torch.allclose(without, hidden)


def test_the_repetition_penalty_leaves_eos_alone_where_it_is_padding_too():
    model = personalize(make_model("llama"))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = EOS
    outputs = model.generate(
        IDS,
        user_ids="ann",
        max_new_tokens=1,
        repetition_penalty=5.0,
        do_sample=False,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    penalized = (outputs.scores[0] != outputs.logits[0]).nonzero()[:, 1].tolist()
    assert penalized == IDS[0].tolist()


def test_token_types_are_those_of_the_prompt_in_generation():
    model = personalize(make_model("gptj"))
    types = torch.tensor([[4, 5, 4, 5]])
    scores = model.generate(
        IDS,
        token_type_ids=types,
        user_ids="ann",
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    ).logits[0]
    torch.testing.assert_close(scores, model(IDS, token_type_ids=types, user_indices=ANN).logits[:, -1])


# --- Evaluation -------------------------------------------------------------------------------------------------------


def test_a_tie_is_not_right(make_trainer, preferences):
    row = preferences[0]
    same = Dataset.from_list([{**row, "rejected": row["chosen"]}])
    metrics = make_trainer().evaluate(same)
    assert metrics["eval_users/accuracy_mean"] == 0.0
    assert metrics["eval_users/accuracy_swapped"] == 0.0


def test_each_evaluation_counts_its_own_pairs(make_trainer, preferences):
    trainer = make_trainer()
    row = preferences[0]
    flipped = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    one, other = Dataset.from_list([row]), Dataset.from_list([flipped])
    for eval_dataset in (one, other, {"one": one, "other": other, "again": one}):
        trainer.evaluate(eval_dataset)
    accuracies = [
        log[name] for log in trainer.state.log_history for name in log if name.endswith("users/accuracy_mean")
    ]
    assert accuracies in ([1.0, 0.0] * 2 + [1.0], [0.0, 1.0] * 2 + [0.0])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_pairs_that_were_predicted_do_not_count_in_the_next_evaluation(make_trainer, preferences):
    row = preferences[0]
    flipped = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    one = Dataset.from_list([row])
    tokenized = make_trainer(trainer_kwargs={"train_dataset": Dataset.from_list([flipped])}).train_dataset
    trainer = make_trainer()
    accuracy = trainer.evaluate(one)["eval_users/accuracy_mean"]
    trainer.predict(tokenized)
    assert trainer.evaluate(one)["eval_users/accuracy_mean"] == accuracy  # 0 or 1; one half with the other pair


def test_the_generic_user_is_evaluated_where_alpha_is_one(make_trainer, preferences):
    metrics = make_trainer(personalization_alpha=1.0).evaluate(preferences)
    assert 0 <= metrics["eval_generic/rewards/accuracies"] <= 1


def test_the_users_metrics_are_of_the_pass_with_the_own_soft_prompt(make_trainer):
    trainer = make_trainer(beta=0.3)
    disturb(trainer)
    examples, batch = batch_of(trainer, [0, 1, 2, 3])
    trainer.model.eval()
    trainer.compute_loss(trainer.model, batch)
    metrics = trainer._metrics["eval"]
    for prefix, users in (("", [1, 0, 0, 2]), ("generic/", [0, 0, 0, 0])):
        chosen = [
            log_prob_by_hand(
                trainer.model, e["prompt_ids"], e["chosen_ids"], soft_prompt_by_hand(trainer.user_model, u)
            )
            for e, u in zip(examples, users, strict=True)
        ]
        assert metrics[prefix + "logps/chosen"] == [pytest.approx(sum(map(float, chosen)) / 4, rel=1e-5)]
    assert not [name for name in metrics if "swap" in name]


def test_tokens_past_the_shorter_answer_count_in_the_accuracy_of_users_as_in_trls(make_trainer, preferences):
    accuracies = []
    for ld_alpha in (0.0, None):
        trainer = make_trainer(ld_alpha=ld_alpha, per_device_eval_batch_size=8)
        disturb(trainer, seed=3)
        metrics = trainer.evaluate(
            preferences
        )  # as many pairs of `ann` as of `bo`: the mean over pairs is that over users
        assert metrics["eval_users/accuracy_mean"] == metrics["eval_rewards/accuracies"]
        accuracies.append(metrics["eval_users/accuracy_mean"])
    assert accuracies[0] != accuracies[1]


# --- Precomputed reference --------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch):
    """Grows by one with each pass of the reference."""
    counted = []
    original = DPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(
        DPOTrainer, "compute_ref_log_probs", lambda self, *args: counted.append(1) or original(self, *args)
    )
    return counted


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_side_that_is_cut_belongs_to_the_key_of_the_reference(make_trainer, preferences, passes):
    rows = preferences.map(lambda row: {"prompt": "cats " + row["prompt"]})
    log_probs = []
    for side in ("keep_start", "keep_end", "keep_start"):
        trainer = make_trainer(
            precompute_ref_log_probs=True,
            max_length=7,
            truncation_mode=side,
            trainer_kwargs={"train_dataset": rows},
        )
        log_probs.append(trainer.train_dataset["ref_chosen_logps"][:])
    assert log_probs[0] == log_probs[2] != log_probs[1]
    assert len(passes) == 4  # two batches for each side


def test_an_adapter_that_is_the_reference_belongs_to_its_key(make_trainer, model_dirs, preferences, passes):
    rows = preferences.map(lambda row: {"prompt": row["prompt"] + " dogs yes dogs"})
    log_probs = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dirs["gptj"]), config)
        trainer = make_trainer(
            precompute_ref_log_probs=True,
            trainer_kwargs={"model": model, "processing_class": make_tokenizer(), "train_dataset": rows},
        )
        log_probs.append(trainer.train_dataset["ref_chosen_logps"][:])
    assert log_probs[0] == log_probs[2] != log_probs[1]
    assert len(passes) == 4


def test_where_a_text_ends_belongs_to_the_key_of_the_reference():
    def key(prompts, chosen):
        rows = {"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": [[4], [4]]}
        return rows_fingerprint(Dataset.from_dict(rows), ())

    one = key([[1, 2], [3]], [[5], [6]])
    assert one == key([[1, 2], [3]], [[5], [6]])
    assert one != key([[1], [2, 3]], [[5], [6]])
    assert one != key([[1, 2], [3, 5]], [[], [6]])


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_saves(make_trainer, tmp_path):
    """A function that saves the model `old` or `new` of two that differ in language model and users."""
    old = personalize(make_model())
    new = personalize(make_model(seed=1))
    new.user_model.generic_prompt.data.add_(1)
    return {"old": old, "new": new}


def test_a_save_killed_between_any_two_files_is_old_or_refused_or_new(two_saves, tmp_path, monkeypatch):
    replace, outcomes = os.replace, []
    while outcomes[-1:] != ["new"]:
        shutil.rmtree(tmp_path / "final", ignore_errors=True)
        two_saves["old"].save_pretrained(tmp_path / "final")
        left = [len(outcomes)]

        def kill(source, target, left=left):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", kill)
            try:
                two_saves["new"].save_pretrained(tmp_path / "final")
            except KeyboardInterrupt:
                pass
        try:
            loaded = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "final")
        except ValueError as error:
            if "parts of two saves" not in str(error):
                raise
            outcomes.append("refused")
            continue
        (same,) = (
            name
            for name, model in two_saves.items()
            if torch.equal(loaded(IDS, user_indices=ANN).logits, model(IDS, user_indices=ANN).logits)
        )
        outcomes.append(same)
    assert set(outcomes) == {"old", "refused", "new"}
    assert outcomes == sorted(outcomes, key=["old", "refused", "new"].index)


def test_a_file_is_as_it_was_if_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "users.json"
    UserVocab(["ann"]).save_pretrained(tmp_path)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full_disk)
        with pytest.raises(OSError, match="disk full"):
            UserVocab(["somebody else", "bo"]).save_pretrained(tmp_path)
    assert path.read_bytes() == before


def test_fingerprint_of_a_large_file_has_blocks_from_all_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SAMPLE_BYTES", 4)
    monkeypatch.setattr(files, "NUM_SAMPLES", 4)
    path = tmp_path / "model.safetensors"
    content = bytes(64)
    seen = set()
    for position in (None, 0, 21, 42, 63):
        changed = bytearray(content)
        if position is not None:
            changed[position] = 1
        path.write_bytes(changed)
        seen.add(files.fingerprint(path))
    path.write_bytes(content + bytes(1))
    seen.add(files.fingerprint(path))
    assert len(seen) == 6


def test_weights_that_are_gone_are_noticed(tmp_path):
    with pytest.raises(ValueError, match="model.safetensors is not the file that the user model"):
        check_fingerprints(tmp_path, {"language_model_files": {"model.safetensors": "0" * 64}})


def test_training_does_not_go_on_with_a_vocabulary_of_another_size(make_trainer, tmp_path):
    make_trainer().save_model(str(tmp_path / "first"))
    UserVocab(["ann", "bo", "cy"]).save_pretrained(tmp_path / "first/user_model")
    with pytest.raises(ValueError, match="rows for 2 users, the vocabulary has 3"):
        make_trainer(trainer_kwargs={"model": str(tmp_path / "first")})


def test_training_goes_on_and_resumes_from_one_save_only(make_trainer, tmp_path, two_saves):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(**settings)
    trainer.train()
    checkpoint = tmp_path / "out/checkpoint-2"
    make_trainer(trainer_kwargs={"model": str(checkpoint)})
    two_saves["new"].save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match="parts of two saves"):
        make_trainer(trainer_kwargs={"model": str(checkpoint)})
    with pytest.raises(ValueError, match="parts of two saves"):
        make_trainer(**settings).train(resume_from_checkpoint=True)


def test_the_last_checkpoint_is_the_one_with_the_highest_number(make_trainer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(**settings).train()
    for step, number in ((1, 9), (2, 10)):
        (tmp_path / f"out/checkpoint-{step}").rename(tmp_path / f"out/checkpoint-{number}")

    class NoStep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise AssertionError("there was a step to train after the last checkpoint")

    resumed = make_trainer(**settings)
    resumed.add_callback(NoStep())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


@pytest.mark.parametrize("best", [False, True], ids=["resumed", "best"])
def test_weights_that_transformers_saves_under_other_names_come_back(make_trainer, preferences, tmp_path, best):
    make_family("mixtral").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    settings = {
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "trainer_kwargs": {"model": str(tmp_path / "model"), "eval_dataset": preferences},
    }
    trained = make_trainer(**settings)
    trained.train()
    if best:
        other = make_trainer(**settings, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1)
        other.state.best_model_checkpoint = str(tmp_path / "out/checkpoint-2")
        other._load_best_model()
    else:
        other = make_trainer(**settings)
        other.train(resume_from_checkpoint=True)  # nothing left to do
    expected = trained.model.state_dict()
    assert [name for name in expected if "experts" in name]
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_users_that_the_caller_gathered_are_those_written(tmp_path):
    model = personalize(make_model())
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.user_model.user_offsets.weight, model.user_model.user_offsets.weight + 1)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight + 1)
