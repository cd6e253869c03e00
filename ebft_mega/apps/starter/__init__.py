"""A starter configuration for a model, its data and a machine: what `tools/new_config.py` writes."""
