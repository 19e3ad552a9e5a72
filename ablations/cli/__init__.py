"""The command line of run_all.py."""
