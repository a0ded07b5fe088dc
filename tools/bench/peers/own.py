"""wastenot's own decoder, as the trainer builds it, and its MoE layer alone."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor, nn

from ....launch.config import DataConfig, LogConfig, LoopConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from ....launch.optimizer import make_optimizer
from ....launch.step import StepResult, make_stepper
from ....moe.adapters.huggingface import load_huggingface
from ....moe.config import MoEConfig
from ....moe.decoder import Decoder, build_decoder
from ....moe.layer import MoELayer
from ....parallel.collectives import tune_pieces
from ....parallel.config import ParallelConfig
from ....parallel.gradients import Gradients
from ....parallel.mesh import Mesh, make_mesh, single
from ..cases import Case, make_batch
from ..layer_cases import LayerCase, LayerWeights
from ..layer_step import PeerLayer, whole
from ..step import LEARNING_RATE
from .remote import Place


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


class Windows:
    """The batch of a case, where the trainer looks for samples."""

    def __init__(self, case: Case) -> None:
        inputs_BS, targets_BS = make_batch(case)
        self.windows = torch.cat([inputs_BS, targets_BS[:, -1:]], dim=1).numpy()

    def take(self, first: int, count: int) -> np.ndarray:
        """Sequences [first, first + count) of the batch, [count, S + 1]."""
        return self.windows[first : first + count]


class TrainerStep:
    """The trainer's own step on one of any number of ranks, with its gradient norm and its account of loads."""

    def __init__(self, config: TrainConfig, mesh: Mesh, weights: dict[str, Tensor], windows: Windows) -> None:
        decoder = build_decoder(config.model, config.router, mesh, piece_bytes=tune_pieces(mesh))
        load_huggingface(decoder, weights, "mixtral")
        gradients = Gradients(decoder, mesh, config.parallel.bucket_bytes)
        optimizer = make_optimizer(decoder, config.optimizer)
        self.stepper = make_stepper(config, mesh, decoder, optimizer, gradients, windows)  # pyright: ignore[reportArgumentType]

    def probe(self) -> tuple[float, float]:
        """Loss and gradient norm of the first batch, over all ranks; does a step, with a learning rate next to none."""
        result = self._step()
        return result.loss, result.grad_norm

    def run(self) -> float:
        """Does one step and returns its seconds."""
        start = time.perf_counter()
        self._step()
        return time.perf_counter() - start

    def close(self) -> None:
        """Nothing to release in this process."""

    def _step(self) -> StepResult:
        return self.stepper.step(0, 0, stop=False)


def build_rank(case: Case, weights: dict[str, Tensor], place: Place) -> TrainerStep:
    """The decoder of `case` on one of the ranks that share its experts."""
    config = TrainConfig(
        model=case.model,
        router=case.router,
        parallel=ParallelConfig(expert=place.world),
        optimizer=OptimizerConfig(lr=LEARNING_RATE, clip_norm=0.0),
        schedule=ScheduleConfig(kind="constant", warmup_steps=0),
        data=DataConfig(seq_len=case.seq_len),
        train=LoopConfig(batch=case.batch, precision=case.dtype),
        log=LogConfig(dir="unused"),
    )
    # As the trainer does, but for its poisoning of fresh memory, which it leaves out as well.
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    return TrainerStep(config, make_mesh(config.parallel, "cpu"), weights, Windows(case))


def build_layer(case: LayerCase, weights: LayerWeights) -> PeerLayer:
    """The layer of `case` on one rank, with the kernels that `auto` takes."""
    moe = MoEConfig(experts=case.experts, d_expert=case.d_expert)
    layer = MoELayer(case.d_model, moe, case.router, single()).to(case.torch_dtype)
    parameters = layer.router.weight, layer.experts.gate_up, layer.experts.down
    return PeerLayer(layer, lambda x_TD: layer(x_TD)[0], whole(parameters, weights))
