"""Which documents stay: duplicates, and what else a build leaves out or sets apart."""
