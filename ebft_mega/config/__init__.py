"""What a run is told to do: the schema, how a file is read, what is checked and what `--dry-run` prints."""
