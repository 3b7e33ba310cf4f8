"""Encoder-decoder models: the layers of both in one row, each stage running the model's own forward."""

from __future__ import annotations

from torch import nn

from ..meta import is_encoder_decoder
from .decoder import DecoderFamily


class EncoderDecoderFamily(DecoderFamily):
    """As a decoder, but stages in turn draw random numbers in another order: the decoder's embeddings are the first stage's."""

    draws_in_turn = False

    def accepts(self, model: nn.Module) -> bool:
        """Those that take `decoder_input_ids`."""
        return super().accepts(model) and is_encoder_decoder(model)
