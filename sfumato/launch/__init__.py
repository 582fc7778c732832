"""Where it runs: stages one after another, in this machine or on Slurm."""
