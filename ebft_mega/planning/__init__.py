"""What a run needs and what it will do: checks against the world, layouts, memory, the dry run. No torch."""
