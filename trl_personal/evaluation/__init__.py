"""Evaluation of trained models: who gains, against which baselines, and how answers change."""

from .answer_features import answer_features, describe_answers, distinct_n, repetition
from .answers import answers_by_user, judge_both_ways, opposite_users, summarize_answers, win_rates
from .evaluate import evaluate_model, evaluate_trainer
from .fluency import answer_log_probs, base_answers, nats_per_token, reference_policy, with_wish
from .report import PersonalizationReport, personalization_table
from .results import ModelEvaluation, describe_run
from .scoring import ScoredPairs, score_pairs
from .verdict import evaluate_margins


__all__ = [
    "ModelEvaluation",
    "PersonalizationReport",
    "ScoredPairs",
    "answer_features",
    "answer_log_probs",
    "answers_by_user",
    "base_answers",
    "describe_answers",
    "describe_run",
    "distinct_n",
    "evaluate_margins",
    "evaluate_model",
    "evaluate_trainer",
    "judge_both_ways",
    "nats_per_token",
    "opposite_users",
    "personalization_table",
    "reference_policy",
    "repetition",
    "score_pairs",
    "summarize_answers",
    "win_rates",
    "with_wish",
]
