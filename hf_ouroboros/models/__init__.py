"""Architectures that plain transformers lacks, as ordinary transformers models."""
