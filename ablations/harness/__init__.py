"""Run the cases of sweeps on this machine and store their rows."""
