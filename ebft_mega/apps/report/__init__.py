"""Pages that a person looks at: one run, several arms side by side."""
