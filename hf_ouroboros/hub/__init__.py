"""What goes to the Hub beside the weights: the model card."""

from __future__ import annotations

from hf_ouroboros.hub.card import CardFacts, build_card

__all__ = ["CardFacts", "build_card"]
