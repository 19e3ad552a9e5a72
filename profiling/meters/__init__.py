"""One file per quantity that is measured, counted or predicted."""
