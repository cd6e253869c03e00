"""A model's sizes and switches, and its partition over parallel ranks, without tensors. No torch."""
