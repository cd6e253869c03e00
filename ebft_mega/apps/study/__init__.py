"""Experiments of several commands: the three arms of the quickstart, and the study over several seeds."""
