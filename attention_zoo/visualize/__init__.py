"""Figures of the receptive field of a query and of the regions BRA routes it to."""
