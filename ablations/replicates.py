"""What several processes that measured the same case say together.

Whatever disturbs a process only ever slows it down: another tenant of the machine, a lower clock, pages that lie badly
in memory. So the fastest process is the nearest to the code's own time, and others that come as near, at other moments
of the run, are the evidence that it was no accident.
"""

from collections.abc import Sequence

AGREEMENT = 0.04
"""By how much the three fastest processes may differ before more of them are asked."""
MOST = 9
"""Processes that are asked at most."""


def interval(medians: Sequence[float]) -> tuple[float, float]:
    """The median of the fastest process and of the runner-up, of at least two."""
    low, high = sorted(medians)[:2]
    return low, high


def settled(medians: Sequence[float]) -> bool:
    """Whether the three fastest processes agree, or there were as many as are asked at most."""
    if len(medians) < 3:
        return False
    low, _, third = sorted(medians)[:3]
    return third <= low * (1 + AGREEMENT) or len(medians) >= MOST
