"""Process groups and the ZeRO engine: everything that communicates."""
