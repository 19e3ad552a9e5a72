"""A run spread over the nodes of a Slurm cluster."""
