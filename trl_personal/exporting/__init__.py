"""Exports: a trained model as files that other engines serve."""
