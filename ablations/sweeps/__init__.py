"""The sweeps: one file each, a question and its axes."""
