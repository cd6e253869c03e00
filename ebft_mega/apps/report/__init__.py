"""HTML report pages: one run, trained models side by side, and a study over several seeds."""
