"""Configuration: the keys with their defaults (`schema.py`), loading a YAML file, and checks. No torch."""
