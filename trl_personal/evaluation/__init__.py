"""Evaluation of trained models: who gains, against which baselines, and how answers change."""
