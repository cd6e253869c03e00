"""What a model looks like and how it is cut for parallel ranks, without its tensors. No torch."""
