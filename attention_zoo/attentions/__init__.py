"""The registered attentions: one file or package each, with the registered name."""
