"""Training: the trainers, their settings, and what a batch looks like."""
