"""What is not on the training path: reports, evaluation, models in and out, the benchmark, the quickstart and the study."""
