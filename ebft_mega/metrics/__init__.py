"""Metrics of a run: phase times, memory, communication, profiles, and the files and console they are written to."""
