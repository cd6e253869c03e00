"""What an experiment's file declares: read, and everything that is wrong with it."""
