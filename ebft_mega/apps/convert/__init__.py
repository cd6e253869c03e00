"""Import and check Hugging Face models, export checkpoints to that form, compare logits with transformers."""
