"""Execution of a case: processes, limits, the machine."""
