"""The benchmark: a naive baseline and this trainer run the same step, and their work, time and memory are compared."""
