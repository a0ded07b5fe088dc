"""wastenot's own decoder, as the trainer builds it, and its MoE layer alone."""

from __future__ import annotations

from torch import Tensor, nn

from ....moe.adapters.huggingface import load_huggingface
from ....moe.config import MoEConfig
from ....moe.decoder import Decoder, build_decoder
from ....moe.layer import MoELayer
from ....parallel.mesh import single
from ..cases import Case
from ..layer_cases import LayerCase, LayerWeights
from ..layer_step import PeerLayer, whole


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


def build_layer(case: LayerCase, weights: LayerWeights) -> PeerLayer:
    """The layer of `case` on one rank, with the kernels that `auto` takes."""
    moe = MoEConfig(experts=case.experts, d_expert=case.d_expert)
    layer = MoELayer(case.d_model, moe, case.router, single()).to(case.torch_dtype)
    parameters = layer.router.weight, layer.experts.gate_up, layer.experts.down
    return PeerLayer(layer, lambda x_TD: layer(x_TD)[0], whole(parameters, weights))
