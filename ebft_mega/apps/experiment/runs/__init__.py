"""The runs of an experiment: which there are, where they lie, what they are made from, how far they are."""
