"""From a dataset to batches of fixed-length rows: order, packing, mixing, the stream and its state."""
