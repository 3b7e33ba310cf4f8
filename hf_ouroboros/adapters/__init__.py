"""PEFT adapters: what of a wrapped model is split into stages, what is refused, and what is saved. Imports peft lazily."""

from .quantized import check_quantized
from .wrapping import base_of, check_adapters, is_adapted

__all__ = ["base_of", "check_adapters", "check_quantized", "is_adapted"]
