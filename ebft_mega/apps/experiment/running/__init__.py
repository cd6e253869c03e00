"""Run an experiment: its jobs on this machine or as Slurm arrays, stage by stage."""
