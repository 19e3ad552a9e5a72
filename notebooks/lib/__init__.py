"""Loading results, style, and saving."""
