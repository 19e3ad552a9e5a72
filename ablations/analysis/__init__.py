"""Analysis of results: comparison, recommendation, tables."""
