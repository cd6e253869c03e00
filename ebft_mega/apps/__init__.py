"""What is not on the training path: reports, evaluation, models in and out, benchmark, quickstart and study."""
