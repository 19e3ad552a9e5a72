"""Measurements for a few minutes of GPU time, the most valuable first."""
