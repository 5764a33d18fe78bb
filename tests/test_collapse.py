"""A training that goes on too fast: pairs may still come out right, and the verdict says that the answers have collapsed."""

from types import SimpleNamespace

import pytest
from conftest import load_example
from transformers import AutoTokenizer

from trl_personal import PersonalizedDPOConfig, PersonalizedDPOTrainer
from trl_personal.data import make_length_preferences
from trl_personal.evaluation import answers_by_user, base_answers, evaluate_trainer, reference_policy


RATE, RATE_OF_USERS = (
    1e-4,
    3.5e-3,
)  # what the example trains with: the second is 0.03 of the embeddings' standard deviation
WISHES = {"shorter": "Shorter.", "longer": "Longer."}
DECODING = {"max_new_tokens": 50, "do_sample": False}


@pytest.fixture(scope="module")
def warmed_up(tmp_path_factory):
    """The example's small GPT-J, which writes both kinds of summaries, and its data."""
    folder = tmp_path_factory.mktemp("warmed_up")
    dataset = make_length_preferences(num_users=4, train_pairs_per_user=150, test_pairs_per_user=12, shorter_share=0.5)
    args = PersonalizedDPOConfig(
        output_dir=str(folder), max_length=256, use_cpu=True, bf16=False, gradient_checkpointing=False,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    example = load_example("gptj_length")
    return example.warm_up(dataset["train"], SimpleNamespace(sft_steps=400), args), dataset, args


def train_and_evaluate(warmed_up, times):
    model, dataset, args = warmed_up
    settings = {name: getattr(args, name) for name in ("max_length", "use_cpu", "bf16", "save_strategy", "report_to")}
    args = PersonalizedDPOConfig(
        output_dir=f"{args.output_dir}/times_{times}", max_steps=60, beta=0.5, learning_rate=RATE * times,
        user_learning_rate=RATE_OF_USERS * times, per_device_eval_batch_size=24, disable_tqdm=True, **settings,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = PersonalizedDPOTrainer(model, args=args, train_dataset=dataset["train"], processing_class=tokenizer)
    trainer.train()
    rows = dataset["test"]
    wishes = {row["user_id"]: WISHES[row["preference"]] for row in rows}
    prompts = list(dict.fromkeys(rows["prompt"]))[:12]
    answers = answers_by_user(trainer.model, tokenizer, prompts, [*wishes, None], **DECODING)
    with reference_policy(trainer) as reference:
        base = base_answers(reference, tokenizer, prompts, wishes, **DECODING)
    return evaluate_trainer(trainer, rows, prompts=prompts, answers=answers, base_answers=base, wishes=wishes)


@pytest.mark.slow
def test_a_run_at_thirty_times_the_rate_is_said_to_collapse_and_the_plain_one_is_not(warmed_up):
    plain = train_and_evaluate(warmed_up, 1)
    print(plain.overall_verdict, plain.answers_report.verdict)
    assert plain.answers_report.collapse is None
    fast = train_and_evaluate(warmed_up, 30)
    print(fast.overall_verdict, fast.answers_report.verdict)
    assert fast.answers_report.collapse.startswith("Answers collapse for ")
    assert "repeated bigrams" in fast.answers_report.collapse or "nats per token" in fast.answers_report.collapse
    assert fast.overall_verdict.endswith(fast.answers_report.collapse)
