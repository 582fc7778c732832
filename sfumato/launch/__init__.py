"""Launches: stages one after another, on this machine or on Slurm."""
