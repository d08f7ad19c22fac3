"""Pretraining of Vision-Language-Action models in JAX, on one machine or on many."""

__version__ = "0.1.0"
