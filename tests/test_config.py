from dataclasses import fields

import pytest
from trl import DPOConfig, TrlParser

from trl_personal import PersonalizedDPOConfig
from trl_personal.training.config import PersonalizationConfig


@pytest.fixture
def make(tmp_path):
    return lambda config_class=PersonalizedDPOConfig, **kwargs: config_class(
        str(tmp_path), use_cpu=True, bf16=False, **kwargs
    )


def test_defaults_are_the_papers(make):
    args = make()
    assert (args.user_model_kind, args.num_virtual_tokens, args.personalization_alpha) == ("individual", 10, 0.5)
    assert (args.num_clusters, args.soft_prompt_init, args.user_id_column) == (10, "sample_vocab", "user_id")
    assert args.user_learning_rate is None


def test_settings_of_trl_keep_their_defaults(make):
    ours, theirs = make(), make(DPOConfig)
    names = {field.name for field in fields(theirs)} - {"logging_dir", "run_name"}
    assert {name: getattr(ours, name) for name in names if name != "accelerator_config"} == {
        name: getattr(theirs, name) for name in names if name != "accelerator_config"
    }


def test_a_plain_config_is_taken_over_whole(make):
    theirs = make(
        DPOConfig, beta=0.7, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2], hub_token="secret", max_length=77
    )
    ours = PersonalizedDPOConfig.from_trl_config(theirs)
    for field in fields(theirs):
        if field.init and field.name != "accelerator_config":
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert ours.num_virtual_tokens == 10
    assert PersonalizedDPOConfig.from_trl_config(ours) is ours


def test_every_setting_has_a_help():
    ours = {field.name: field for field in fields(PersonalizedDPOConfig)}
    for name in ours.keys() - {field.name for field in fields(DPOConfig)}:
        assert ours[name].metadata["help"], name
        assert f"{name} (" in PersonalizedDPOConfig.__doc__ + PersonalizationConfig.__doc__, name


def test_parses_from_the_command_line(tmp_path):
    (args,) = TrlParser((PersonalizedDPOConfig,)).parse_args_and_config(
        [
            "--output_dir",
            str(tmp_path),
            "--user_model_kind",
            "cluster",
            "--num_clusters",
            "4",
            "--bf16",
            "False",
            "--use_cpu",
        ]
        + ["--personalization_alpha", "0.3", "--user_learning_rate", "1e-3"]
    )
    assert (args.user_model_kind, args.num_clusters) == ("cluster", 4)
    assert (args.personalization_alpha, args.user_learning_rate) == (0.3, 1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"personalization_alpha": 1.1}, r"`personalization_alpha` must lie in \[0, 1\], got 1.1"),
        ({"personalization_alpha": -0.1}, r"`personalization_alpha` must lie in \[0, 1\], got -0.1"),
        ({"personalization_alpha": float("nan")}, "`personalization_alpha` must be a finite number, got nan"),
        ({"user_learning_rate": float("inf")}, "`user_learning_rate` must be a finite number, got inf"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be a finite number, got nan"),
        ({"beta": float("-inf")}, "`beta` must be a finite number, got -inf"),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, float("nan")]},
            "`loss_weights` must be a finite number",
        ),
        ({"max_grad_norm": float("nan")}, "`max_grad_norm` must be a finite number"),
        ({"on_divergence": "ignore"}, "`on_divergence` must be one of"),
        ({"num_virtual_tokens": 0}, "`num_virtual_tokens` must be at least 1, got 0"),
        ({"num_virtual_tokens": -3}, "`num_virtual_tokens` must be at least 1, got -3"),
        ({"num_clusters": 0}, "`num_clusters` must be at least 1, got 0"),
        ({"user_rank": 0}, "`user_rank` must be at least 1, got 0"),
        (
            {"user_model_kind": "mystery"},
            r"no user model of kind 'mystery'. Known kinds: \['cluster', 'individual', 'low_rank', 'point'\]",
        ),
        ({"soft_prompt_init": "zeros"}, "`soft_prompt_init` must be one of .*got 'zeros'"),
        ({"soft_prompt_init": "text"}, '`soft_prompt_init_text` and `soft_prompt_init="text"` go together'),
        (
            {"soft_prompt_init_text": "Write briefly."},
            '`soft_prompt_init_text` and `soft_prompt_init="text"` go together',
        ),
        ({"user_learning_rate": -1.0}, "`user_learning_rate` must not be negative"),
    ],
)
def test_bad_settings_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_batches_that_would_tear_pairs_apart_are_refused(make):
    config = {"dispatch_batches": True, "split_batches": True}
    with pytest.raises(ValueError, match="`dispatch_batches` and `split_batches` would give the chosen answers"):
        make(accelerator_config=config)
    assert make(accelerator_config={"dispatch_batches": True}).accelerator_config.dispatch_batches
    assert make(user_model_kind="none", accelerator_config=config).accelerator_config.split_batches


@pytest.mark.parametrize("config_class", [PersonalizedDPOConfig, DPOConfig])
def test_padding_free_is_refused_until_trl_has_it(make_args, make_trainer, config_class, caplog):
    with pytest.raises(ValueError, match="`padding_free=True` does nothing in this version of TRL"):
        make_trainer(args=make_args(config_class, padding_free=True))
    assert (
        make_trainer(user_model_kind="none", padding_free=True).padding_free is False
    )  # if it is not, take the refusal off
