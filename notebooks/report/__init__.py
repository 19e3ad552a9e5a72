"""One HTML page of everything in a results folder."""
