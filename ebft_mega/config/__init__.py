"""What a run is told to do: the keys, how a file is read, and the rules that values must agree on. No torch."""
