"""What the evaluation of a trained folder found, as files and pictures."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..files import write_atomically
from ..user_models import UserModel
from ..users import UserVocab
from .plots import plot_length_by_user, plot_report, plot_training_curves, plot_user_map
from .report import PersonalizationReport
from .user_report import GENERIC_USER


GENERATED = ("mean_generated_length", "length_drift", "distinct_1", "distinct_2", "empty_share")


@dataclass(frozen=True)
class ModelEvaluation:
    """
    What [`evaluate_model`] finds.

    Args:
        report ([`PersonalizationReport`]): Accuracies, gain and verdict.
        pairs (`Dataset`): A row for each pair: `row` in the dataset, `user_id`, and a column of margins for each scorer.
        num_dropped (`int`): Rows that were left out, as their prompt alone is too long.
        metrics (`dict[str, float]`): Of `trainer.evaluate`.
        answers (`list[dict]`): For each user the row of [`~evaluation.generation_report.summarize_answers`]; the last
            one, with `None`, is the generic user. Empty if nothing was generated.
        samples (`list[dict]`): The answers of all users, and of the reference, to each prompt.
        values (`Mapping`): For each user the value in `column`.
        column (`str`): The column of opposites, or empty.
        user_model, user_vocab: Of the model.
        log_history (`list[dict]`): Of its training.
        run (`dict`): Command, versions, hardware, settings.
    """

    report: PersonalizationReport
    pairs: Dataset
    num_dropped: int
    metrics: dict[str, float]
    answers: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    values: Mapping[str, Any]
    column: str
    user_model: UserModel
    user_vocab: UserVocab
    log_history: list[dict[str, Any]]
    run: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All but the pairs, for JSON. The ids of users are in `users` and `samples`."""
        found = self.report.to_dict()
        found["users"] = self.user_rows()
        return {
            **{name: found[name] for name in ("verdict", "has_gain", "gain", "advantages", "groups")},
            **{name: found[name] for name in ("worst_user", "worst_decile", "calibration", "users")},
            "num_dropped": self.num_dropped,
            "generic_answers": {
                name: row[name] for row in self.answers if row["user_id"] is None for name in GENERATED
            },
            "metrics": self.metrics,
            "samples": self.samples,
            "run": self.run,
        }

    def user_rows(self) -> list[dict[str, Any]]:
        """A flat row for each user."""
        answers = {row["user_id"]: {name: row[name] for name in GENERATED} for row in self.answers}
        rows = []
        for user in self.report.users:
            row: dict[str, Any] = {
                **{"user_id": user.user_id, "seen": user.seen, "minority": user.minority},
                **{"num_pairs": user.num_pairs, "num_prompts": user.num_prompts, "gain": user.gain},
            }
            for scorer, accuracy in user.accuracy.items():
                row |= {
                    f"accuracy_{scorer}": accuracy.value,
                    f"accuracy_{scorer}_low": accuracy.low,
                    f"accuracy_{scorer}_high": accuracy.high,
                    f"margin_{scorer}": user.mean_margin[scorer],
                }
            if self.answers:
                row |= answers.get(user.user_id, dict.fromkeys(GENERATED))
            rows.append(row)
        return rows

    def save(self, folder: str | Path) -> list[str]:
        """
        Write `evaluation.json`, the table of users as `users.parquet` and `users.json`, `pairs.parquet`, and the pictures
        `accuracy_by_user.png`, `user_map.png`, `training_curves.png` and `length_by_user.png`, as far as there is something to
        draw. Returns the names of the files.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows = self.user_rows()
        for name, content in (("evaluation.json", self.to_dict()), ("users.json", rows)):
            write_atomically(
                folder / name, json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False).encode()
            )
        Dataset.from_list(rows).to_parquet(folder / "users.parquet")
        self.pairs.to_parquet(folder / "pairs.parquet")
        plot_report(folder / "accuracy_by_user.png", self.report)
        files = ["evaluation.json", "users.json", "users.parquet", "pairs.parquet", "accuracy_by_user.png"]
        if len(self.user_vocab) > 1:
            values = self.values or {
                user.user_id: round(user.gain, 2) for user in self.report.users if user.user_id and user.seen
            }
            plot_user_map(folder / "user_map.png", self.user_model, self.user_vocab, values, self.column or "gain")
            files.append("user_map.png")
        if any("loss" in entry for entry in self.log_history):
            plot_training_curves(folder / "training_curves.png", self.log_history)
            files.append("training_curves.png")
        if self.answers:
            plot_length_by_user(folder / "length_by_user.png", self._length_rows())
            files.append("length_by_user.png")
        return files

    def _length_rows(self) -> list[dict[str, Any]]:
        values = {user: value for user, value in self.values.items() if value in ("longer", "shorter")}
        return [
            {
                "user_id": GENERIC_USER if row["user_id"] is None else row["user_id"],
                "preference": values.get(row["user_id"]),
                "generated_lengths": row["generated_lengths"],
            }
            for row in self.answers
        ]
