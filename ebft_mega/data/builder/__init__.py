"""From text to a dataset: a parallel build that resumes where it stopped."""
