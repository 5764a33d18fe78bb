"""Evaluation of trained models: who gains, against which baselines, and how answers change."""

from .answer_features import answer_features, describe_answers, distinct_n, repetition
from .answers import answers_by_user, judge_both_ways, opposite_users, summarize_answers, win_rates
from .answers_report import AnswersReport, answers_table
from .answers_verdict import evaluate_answers, overall_verdict
from .evaluate import evaluate_model, evaluate_trainer
from .fluency import answer_log_probs, base_answers, nats_per_token, reference_policy, with_wish
from .judged import JudgeReport, judge_answers, judge_table, length_controlled
from .judges import make_judge
from .probes import Prober, ProbesReport, probes_table
from .report import PersonalizationReport, personalization_table
from .results import ModelEvaluation, describe_run
from .scoring import ScoredPairs, score_pairs
from .verdict import evaluate_margins


__all__ = [
    "AnswersReport",
    "JudgeReport",
    "ModelEvaluation",
    "PersonalizationReport",
    "Prober",
    "ProbesReport",
    "ScoredPairs",
    "answer_features",
    "answer_log_probs",
    "answers_by_user",
    "answers_table",
    "base_answers",
    "describe_answers",
    "describe_run",
    "distinct_n",
    "evaluate_answers",
    "evaluate_margins",
    "evaluate_model",
    "evaluate_trainer",
    "judge_answers",
    "judge_both_ways",
    "judge_table",
    "length_controlled",
    "make_judge",
    "nats_per_token",
    "opposite_users",
    "overall_verdict",
    "personalization_table",
    "probes_table",
    "reference_policy",
    "repetition",
    "score_pairs",
    "summarize_answers",
    "win_rates",
    "with_wish",
]
