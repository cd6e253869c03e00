"""Pretraining-scale Energy-Based Fine-Tuning (strided mode): models trained on their own rollouts."""

__version__ = "0.1.0"
