"""Baselines for comparison, which are not attentions of the zoo."""
