"""Our decoder as DeepSpeed trains it: the loss within the module, experts marked and grouped as its MoE wants.

DeepSpeed finds mixtures of experts by its own layer class, which makes their process groups and names their files in
checkpoints. `ExpertLayer` is one of that class without a layer of its own: it stands for the experts of one of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups, set_z3_leaf_modules
from torch import Tensor, nn

from ...moe.decoder import Block, Decoder
from ...moe.experts import GroupedExperts
from ...parallel.mesh import Mesh

_EXPERTS = "deepspeed_moe.experts.deepspeed_experts."
"""What DeepSpeed calls a layer's experts, by number."""


class Learning(nn.Module):
    """A decoder and what it learns by: `forward(tokens)` is `learn(tokens)`, whose first value is to be minimised."""

    def __init__(self, decoder: Decoder, learn: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.decoder, self._learn = decoder, learn
        self.expert_layers = nn.ModuleDict()
        mesh = decoder.mesh
        if mesh.expert.size > 1:
            for name, module in decoder.named_modules():
                if isinstance(module, GroupedExperts):
                    # In the name of a module there are no dots.
                    self.expert_layers[name.replace(".", "/")] = ExpertLayer(f"decoder.{name}", module, mesh)
        # Gathered together, as FSDP2 does it: how often experts are called differs from rank to rank.
        set_z3_leaf_modules(self, [Block])

    def forward(self, tokens_BS: Tensor) -> Any:
        """See the class."""
        return self._learn(tokens_BS)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As torch's; experts that ranks share are there one by one, as those of `expert_layers`."""
        tensors = super().state_dict(*args, **kwargs)
        for prefix, layer in self._expert_layers():
            for name in layer.stacks:
                del tensors[name]
            tensors.update({prefix + name: tensor for name, tensor in layer.state_dict().items()})
        return tensors

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """What `state_dict` gave."""
        tensors = dict(state_dict)
        for prefix, layer in self._expert_layers():
            for name, stack in layer.stacks.items():
                names = [prefix + layer.name_of(name, number) for number in range(len(stack))]
                tensors[name] = torch.stack([tensors.pop(each) for each in names])
        return super().load_state_dict(tensors, strict, assign)

    def _expert_layers(self) -> Iterator[tuple[str, ExpertLayer]]:
        for name, layer in self.expert_layers.items():
            assert isinstance(layer, ExpertLayer)
            yield f"expert_layers.{name}.", layer


class ExpertLayer(MoE):
    """The experts of one of our layers, as DeepSpeed sees them; computes nothing."""

    def __init__(self, name: str, experts: GroupedExperts, mesh: Mesh) -> None:
        """`name`: of `experts` in the whole."""
        # Not MoE's: it would build a layer.
        nn.Module.__init__(self)
        self.ep_size, self.expert_group_name = mesh.expert.size, group_name(mesh)
        self.num_local_experts = len(experts.gate_up)
        self.num_experts = self.num_local_experts * mesh.expert.size
        self.stacks = {f"{name}.{own}": parameter for own, parameter in experts.named_parameters()}
        """Weights [e, ...] of this rank's experts by their names in the whole, where their module is."""
        for parameter in self.stacks.values():
            # So that DeepSpeed sums its gradients over the ranks of that group alone.
            parameter.allreduce, parameter.group_name = False, self.expert_group_name  # pyright: ignore

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Makes the process groups of experts, once for all layers: the ranks of `Mesh.expert` and `expert_data`."""
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(self.ep_size)

    def name_of(self, stack: str, number: int) -> str:
        """What DeepSpeed calls expert `number` of this rank's in the weight called `stack`."""
        return f"{_EXPERTS}{number}.{stack.rpartition('.')[2]}"

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """This rank's experts, one by one."""
        stacks = [(name, stack.detach()) for name, stack in self.stacks.items()]
        return {self.name_of(name, number): stack[number] for name, stack in stacks for number in range(len(stack))}


def group_name(mesh: Mesh) -> str:
    """What DeepSpeed calls the process groups of the experts of `mesh`."""
    return f"ep_size_{mesh.expert.size}"


def split_groups(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Gives experts that DeepSpeed calls `name` groups of their own: ZeRO shares each group among its own ranks."""
    split: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        of_experts = [not getattr(parameter, "allreduce", True) for parameter in group["params"]]
        for wanted, more in ((False, {}), (True, {"moe": True, "name": name})):
            chosen = [number for number, is_expert in enumerate(of_experts) if is_expert == wanted]
            if chosen:
                # `param_names` beside `params`, where the optimizer was given both.
                lists = {key: [group[key][i] for i in chosen] for key in ("params", "param_names") if key in group}
                split.append({**group, **lists, **more})
    optimizer.param_groups[:] = split


def gather_output_layer(decoder: Decoder) -> None:
    """For ZeRO 3: asked for losses or scores in no module's forward, `decoder` gathers the weight itself."""

    def gathering(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def whole(*args: Any) -> Tensor:
            # With gradients it is in that of `Learning`, around which DeepSpeed has gathered it, for backward too.
            around = (
                nullcontext() if torch.is_grad_enabled() else deepspeed.zero.GatheredParameters(decoder.output_weight)
            )
            with around:
                return call(*args)

        return whole

    decoder.logits, decoder.loss_sum = gathering(decoder.logits), gathering(decoder.loss_sum)
