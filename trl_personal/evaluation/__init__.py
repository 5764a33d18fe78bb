"""Evaluation of trained models: who gains, against which baselines, and how answers change."""

from .answers import answers_by_user, distinct_n, judge_both_ways, opposite_users, summarize_answers, win_rates
from .evaluate import evaluate_model, evaluate_trainer
from .report import PersonalizationReport, personalization_table
from .results import ModelEvaluation, describe_run
from .scoring import ScoredPairs, score_pairs
from .verdict import evaluate_margins


__all__ = [
    "ModelEvaluation",
    "PersonalizationReport",
    "ScoredPairs",
    "answers_by_user",
    "describe_run",
    "distinct_n",
    "evaluate_margins",
    "evaluate_model",
    "evaluate_trainer",
    "judge_both_ways",
    "opposite_users",
    "personalization_table",
    "score_pairs",
    "summarize_answers",
    "win_rates",
]
