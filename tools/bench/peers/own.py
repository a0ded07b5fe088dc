"""wastenot's own decoder, as the trainer builds it."""

from __future__ import annotations

from torch import Tensor, nn

from ....moe.adapters.huggingface import load_huggingface
from ....moe.decoder import Decoder, build_decoder
from ....parallel.mesh import single
from ..cases import Case


class Own(nn.Module):
    """Decoder that answers with its loss alone."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, inputs_BS: Tensor, targets_BS: Tensor) -> Tensor:
        return self.decoder.loss_sum(self.decoder(inputs_BS).hidden_BSD, targets_BS) / targets_BS.numel()


def build(case: Case, weights: dict[str, Tensor]) -> Own:
    """The decoder of `case` on one rank."""
    decoder = build_decoder(case.model, case.router, single())
    load_huggingface(decoder, weights, "mixtral")
    return Own(decoder)
