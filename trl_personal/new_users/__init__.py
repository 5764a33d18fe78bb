"""Users who join a trained model, or are refined later: their rows are fitted, everything else stays to the last bit."""
