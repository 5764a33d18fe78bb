"""The precomputed reference is computed again where something that it depends on has changed, and only there."""

import pytest
import torch
from conftest import make_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_drop_in import count_reference_passes
from transformers import AutoModelForCausalLM

from trl_personal.training.reference_cache import rows_fingerprint


@pytest.fixture
def passes(monkeypatch):
    """Grows by one with each pass of the reference."""
    return count_reference_passes(monkeypatch)


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
