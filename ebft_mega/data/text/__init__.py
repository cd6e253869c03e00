"""Read text input: files, JSON lines, archives, compression."""
