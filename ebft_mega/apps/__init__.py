"""Everything off the training path: reports, evaluation, model conversion, benchmark, quickstart and study."""
