"""Planning before a run starts: checks of its inputs, the layout of ranks, memory, the dry run. No torch."""
