"""What a run writes down about itself: metrics, phase times, outcome, logs."""
