"""Read and write Hugging Face weights: files, tensor names, and how parameters are packed from tensors."""
