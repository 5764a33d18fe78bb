"""The engine of `trl-personal serve`: any model of transformers, in batches that rows join and leave between two tokens."""
