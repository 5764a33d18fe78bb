"""Pictures: few users get their names, many a curve; what cannot be drawn is said."""

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.image import imread

from trl_personal import UserVocab
from trl_personal.audit.chart import draw_audit
from trl_personal.audit.counts import Counts
from trl_personal.audit.kinds import Recommendation
from trl_personal.audit.tastes import Taste
from trl_personal.canvas import drawable
from trl_personal.evaluation.plots import plot_length_by_user, plot_report, plot_training_curves, plot_user_map
from trl_personal.evaluation.plots.user_map import _components
from trl_personal.evaluation.verdict import evaluate_margins
from trl_personal.user_models import get_user_model_class


LOG = [{"step": step, "loss": 1 / step, "rewards/accuracies": 0.5} for step in range(1, 100)]


def make_users(num_users):
    kind = get_user_model_class("individual")
    user_model = kind(kind.config_class(num_users=num_users, num_virtual_tokens=2, token_dim=8))
    with torch.no_grad():
        for parameter in user_model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return user_model, UserVocab([f"user {i}" for i in range(num_users)])


def make_report(num_users):
    rng = np.random.default_rng(0)
    users = np.repeat([f"user {i}" for i in range(num_users)], 5).tolist()
    own, generic, swapped = rng.normal(size=(3, len(users)))
    return evaluate_margins(own, generic, users, rng.integers(50, size=len(users)).tolist(), swapped=swapped)


def ink(path):
    """Share of the picture that is not white."""
    return float((imread(path)[..., :3].min(axis=2) < 0.99).mean())


@pytest.mark.parametrize("num_users", [6, 400])
def test_accuracy_and_length_are_drawn_for_few_and_many(tmp_path, num_users):
    plot_report(tmp_path / "accuracy.png", make_report(num_users))
    rows = [
        {"user_id": f"user {i}", "preference": ["longer", "shorter", None][i % 3], "generated_lengths": [i, i + 5]}
        for i in range(num_users)
    ]
    plot_length_by_user(tmp_path / "length.png", rows)
    for name in ("accuracy", "length"):
        assert ink(tmp_path / f"{name}.png") > 0.01
        assert imread(tmp_path / f"{name}.png").shape[1] <= 1500  # pixels: no chart grows with the users


@pytest.mark.parametrize("values", [None, {"user 0": "a", "user 1": "b"}, {f"user {i}": i / 3 for i in range(30)}])
def test_the_map_of_users_takes_text_and_numbers(tmp_path, values):
    plot_user_map(tmp_path / "map.png", *make_users(30), values, "column")
    assert ink(tmp_path / "map.png") > 0.005


def test_the_axes_of_the_map_are_principal_components():
    user_model, vocab = make_users(12)
    points, shares = _components(user_model, vocab.encode(list(vocab)))
    prompts = user_model(torch.arange(13)).flatten(1).detach().numpy()
    centered = prompts - prompts[1:].mean(axis=0)
    _, deviations, directions = np.linalg.svd(centered[1:], full_matrices=False)
    np.testing.assert_allclose(np.abs(points), np.abs(centered @ directions[:2].T), atol=1e-3)
    np.testing.assert_allclose(shares, deviations[:2] ** 2 / (deviations**2).sum(), atol=1e-4)


def test_training_curves(tmp_path):
    plot_training_curves(tmp_path / "curves.png", [*LOG, {"step": 50, "eval_loss": 0.1}])
    assert ink(tmp_path / "curves.png") > 0.005
    with pytest.raises(ValueError, match="No loss or accuracy was logged"):
        plot_training_curves(tmp_path / "none.png", [{"step": 1, "epoch": 1.0}])


def test_a_map_needs_two_users(tmp_path):
    with pytest.raises(ValueError, match="two users or more, the vocabulary has 1"):
        plot_user_map(tmp_path / "map.png", *make_users(1))


@pytest.fixture
def drawn(monkeypatch):
    """The axes of a picture, kept when it is tidied."""
    kept, tidy = [], Axes.set_title

    def keep(self, *args, **kwargs):
        kept.append(self)
        return tidy(self, *args, **kwargs)

    monkeypatch.setattr(Axes, "set_title", keep)
    return kept


def test_a_component_that_explains_nothing_is_not_stretched(tmp_path, drawn):
    user_model, vocab = make_users(5)
    with torch.no_grad():  # on a line, but for a thousandth
        line = torch.outer(torch.arange(6.0), torch.ones(16)) + 1e-3 * torch.randn(6, 16)
        user_model.user_offsets.weight.copy_(line)
    plot_user_map(tmp_path / "map.png", user_model, vocab)
    (axes,) = drawn
    width, height = (abs(high - low) for low, high in (axes.get_xlim(), axes.get_ylim()))
    box = axes.get_window_extent()
    assert width / box.width == pytest.approx(height / box.height, rel=0.02)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("ann", "ann"),
        ("\U0001f984x", "[1F984]x"),
        ("5$ or $6", r"5\$ or \$6"),
        ("日本", "[65E5][672C]"),
        ("Zoë", "Zoë"),
    ],
)
def test_names_are_drawn_in_characters_that_the_font_has(name, shown):
    assert drawable(name) == shown


@pytest.mark.filterwarnings("error:Glyph")
def test_users_with_emoji_keep_their_names_and_numbers_of_pairs(tmp_path, drawn):
    users = ["\U0001f984", "b$o$"] * 5
    own = np.linspace(-1, 1, 10)
    report = evaluate_margins(own, own, users, [str(i) for i in range(10)], known_users=set(users))
    plot_report(tmp_path / "accuracy.png", report)
    assert {label.get_text() for label in drawn[0].get_xticklabels()} == {"[1F984] (5)", r"b\$o\$ (5)"}


def test_curves_that_are_equal_are_both_seen(tmp_path, drawn):
    log = [{"step": i, "rewards/accuracies": 0.5, "generic/rewards/accuracies": 0.5} for i in range(5)]
    plot_training_curves(tmp_path / "curves.png", log)
    widths = [line.get_linewidth() for line in drawn[0].lines[:2]]
    assert widths[0] > widths[1] + 0.5


@pytest.mark.parametrize("spread", [0.3, 0.57])
def test_a_spread_above_a_half_is_not_cut(drawn, spread):
    counts = Counts(**dict.fromkeys(Counts.__dataclass_fields__, 0) | {"min_pairs": 20, "pairs_per_user": {}})
    draw_audit(counts, [], None, Recommendation("none", "why", {}), [Taste("words", 0.5, spread)])
    (axes,) = [axes for axes in drawn if axes.get_title(loc="left").startswith("Where users")]
    assert axes.get_xlim()[1] == pytest.approx(max(0.5, 1.05 * spread))
