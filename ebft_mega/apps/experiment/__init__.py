"""Experiments that are declared in a file: arms, seeds, splits and comparisons; run, resumed, and reported on."""
