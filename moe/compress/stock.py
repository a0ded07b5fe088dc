"""A Hugging Face checkpoint as a streamed model: transformers' own modules, one layer of them at a time.

Attention, norms, router and shared experts are the family's modules of transformers (extra `hf`), built on meta for
one layer and filled with that layer's tensors; the experts are stacks of ours. Besides stock folders it reads what
`apply` makes of them: fewer layers, and layers that differ.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...parallel.manifest import some
from ..adapters.huggingface import StoredWeights
from .export_config import check_config
from .families import MODULES, FamilyModules
from .fingerprint import stock_fingerprint
from .places import Place, name_of, places_of
from .reading import chosen_experts, most_choices, read_whole, share_of, size_of, whole_shapes
from .shapes import shape_of_config
from .stored import StockFolder, read_stock
from .streamed import Choice, ExpertWeights, LayerSize

__all__ = ["StockLayer", "StockModel"]

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_Around = Callable[[Tensor], tuple[Tensor | None, Any]]


@dataclass
class StockLayer:
    """See `StreamedLayer`."""

    num_experts: int
    is_dense: bool
    experts: ExpertWeights | None
    _module: Any
    """The decoder layer of transformers, without its experts."""
    _family: FamilyModules
    _around: _Around
    """Tokens [B, S, D] -> their mask and rotary table."""

    def attend(self, h_BSD: Tensor) -> Tensor:
        """See `StreamedLayer`."""
        if not h_BSD.numel():
            # A rank without tokens; transformers cannot tell their heads apart.
            return h_BSD
        mask, table = self._around(h_BSD)
        y_BSD, _ = self._module.self_attn(
            hidden_states=self._module.input_layernorm(h_BSD), attention_mask=mask, position_embeddings=table
        )
        return h_BSD + y_BSD

    def norm(self, a_BSD: Tensor) -> Tensor:
        """See `StreamedLayer`."""
        return self._module.post_attention_layernorm(a_BSD)

    def route(self, x_TD: Tensor) -> Choice:
        """See `StreamedLayer`."""
        logits_TE, weights_TK, experts_TK = self._module.mlp.gate(x_TD)
        logits_TE = logits_TE.float()
        if self._family.score == "softmax":
            probs_TE = logits_TE.softmax(-1)
        else:
            scores_TE = logits_TE.sigmoid()
            probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        return Choice(experts_TK, weights_TK.float(), probs_TE)

    def shared(self, x_TD: Tensor) -> Tensor | None:
        """See `StreamedLayer`."""
        feed, family = self._module.mlp, self._family
        if family.shared is None:
            return None
        y_TD = getattr(feed, family.shared)(x_TD)
        return y_TD if family.shared_gate is None else getattr(feed, family.shared_gate)(x_TD).sigmoid() * y_TD

    def dense(self, x_TD: Tensor) -> Tensor:
        """See `StreamedLayer`."""
        return self._module.mlp(x_TD)


class StockModel:
    """See `StreamedModel`; layers are read from safetensors in the family's names."""

    def __init__(self, folder: Path | str, device: torch.device | str = "cpu") -> None:
        """Raises ValueError where `folder` is no checkpoint of a known family, is not whole, or others quantized it;
        ImportError where transformers is missing."""
        self.folder, self.device = Path(folder), torch.device(device)
        self._stock = read_stock(self.folder)
        self.shape, self.family = self._stock.shape, self._stock.family
        self._modules = MODULES[self.family]
        _check_config(self._stock)
        self.config, self._classes = _in_transformers(self._stock.config, self.family)
        self.d_model, self.vocab_size = int(self.config.hidden_size), int(self.config.vocab_size)
        self._rotary = self._class("RotaryEmbedding")(config=self.config).to(self.device)
        self._stored, tensors = StoredWeights(self.folder), self._stock.tensors
        packed = {name for name, tensor in tensors.items() if tensor.dtype == "U8"}
        self._shapes = whole_shapes({name: tensor.shape for name, tensor in tensors.items()}, packed)
        self._places = places_of(self._shapes, self.family, self.shape.layers)
        if missing := sorted({_EMBEDDING, _NORM, self._head} - self._shapes.keys()):
            raise ValueError(f"{self.folder}: misses {some(missing)}")

    @property
    def _head(self) -> str:
        return _EMBEDDING if self.config.tie_word_embeddings else _HEAD

    def _class(self, name: str) -> Any:
        return getattr(self._classes, self._modules.classes + name)

    @property
    def fingerprint(self) -> str:
        """See `StreamedModel`."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return stock_fingerprint(self._stock)

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """See `StreamedModel`."""
        return F.embedding(tokens_BS.cpu(), self._stored[_EMBEDDING]).to(self.device, torch.float32)

    def logits(self, h_BSD: Tensor) -> Tensor:
        """See `StreamedModel`. The output layer stays in memory once it has been asked for."""
        norm, weight = self._output
        return F.linear(norm(h_BSD), weight)

    @cached_property
    def _output(self) -> tuple[nn.Module, Tensor]:
        with torch.device("meta"):
            norm = self._class("RMSNorm")(self.d_model, eps=self.config.rms_norm_eps)
        norm.load_state_dict({"weight": self._read(_NORM)}, assign=True)
        return norm.requires_grad_(False), self._read(self._head)

    def layer(
        self, number: int, kept: Sequence[int] | None = None, share: tuple[int, int] = (0, 1), feed: bool = True
    ) -> StockLayer:
        """See `StreamedModel`."""
        experts = self.shape.experts[number] if feed else 0
        chosen = chosen_experts(number, kept if feed else None, experts, self.shape, self._modules.smallest_group)
        self._check_layer(number)
        is_dense = feed and number in self.shape.dense
        module = self._module(number, len(chosen), experts > 0 or is_dense)
        tensors: dict[str, Tensor] = {}
        for name, wanted in module.state_dict().items():
            tensor = self._read(self._on_disk(number, name))
            if name.startswith("mlp.gate.") and tensor.shape[:1] == (experts,):
                tensor = tensor[list(chosen)]
            if tensor.shape != wanted.shape:
                raise ValueError(
                    f"{self.folder}: {self._on_disk(number, name)} {list(tensor.shape)} is not the "
                    f"{list(wanted.shape)} that its configuration asks for"
                )
            tensors[name] = tensor
        module.load_state_dict(tensors, assign=True)
        stacks = self._experts(number, share_of(chosen, share)) if chosen else None
        module.requires_grad_(False).eval()
        return StockLayer(len(chosen), is_dense, stacks, module, self._modules, self._around(number))

    @property
    def outside_size(self) -> int:
        """See `StreamedModel`."""
        outside = (name for name, place in self._places.items() if place.part == "outside")
        return sum(torch.Size(self._shapes[name]).numel() for name in outside)

    @property
    def element_bytes(self) -> int:
        """See `StreamedModel`."""
        embedding = self._stock.tensors[_EMBEDDING]
        return embedding.length // torch.Size(embedding.shape).numel()

    def size(self, number: int) -> LayerSize:
        """See `StreamedModel`."""
        shapes = {place: self._shapes[name] for name, place in self._inside(number).items()}
        return size_of(shapes, self.shape.experts[number])

    def _inside(self, number: int) -> dict[str, Place]:
        """The layer's tensors. Old checkpoints have one more, a table that follows from the configuration."""
        return {
            name: place
            for name, place in self._places.items()
            if place.layer == number and place.part != "next_n" and place.weight != "inv_freq"
        }

    def _module(self, number: int, num_experts: int, has_feed: bool) -> nn.Module:
        """The layer in transformers' class, on meta, without experts; where nothing follows attention, that alone."""
        config = copy.deepcopy(self.config)
        if num_experts:
            setattr(config, self._modules.num_experts, num_experts)
            # A router of fewer experts than it is to choose would fail, or choose one twice.
            config.num_experts_per_tok = min(self.shape.top_k, most_choices(num_experts, self.shape))
        with torch.device("meta"):
            module = self._class("DecoderLayer")(config, self._stock.origin[number])
        if not has_feed:
            del module.mlp, module.post_attention_layernorm
        elif num_experts:
            del module.mlp.experts
        return module

    def _on_disk(self, number: int, name: str) -> str:
        """Of a tensor of the module."""
        return f"model.layers.{number}." + re.sub(r"^mlp\.", f"{self._modules.feed_on_disk}.", name)

    def _expert_name(self, number: int, expert: int, part: str) -> str:
        return name_of(Place(number, "expert", part, expert), self.family)

    def _check_layer(self, number: int) -> None:
        """Raises ValueError unless the layer's tensors are there, all of them and no others."""
        experts = self.shape.experts[number]
        module = self._module(number, experts, experts > 0 or number in self.shape.dense)
        wanted = {self._on_disk(number, name) for name in module.state_dict()}
        for part in ("gate", "up", "down"):
            wanted |= {self._expert_name(number, expert, part) for expert in range(experts)}
        found = self._inside(number).keys()
        problems = {"misses": sorted(wanted - found), "has, and should not,": sorted(found - wanted)}
        said = "; ".join(f"{what} {some(names)}" for what, names in problems.items() if names)
        if said:
            raise ValueError(f"{self.folder}: layer {number} {said}")

    def _experts(self, number: int, chosen: Sequence[int]) -> ExpertWeights:
        """Their stacks, read expert by expert."""
        F_, D = self._shapes[self._expert_name(number, chosen[0], "gate")]
        gate_up, down = torch.empty(len(chosen), 2 * F_, D), torch.empty(len(chosen), D, F_)
        for place, expert in enumerate(chosen):
            parts = {"gate": gate_up[place, :F_], "up": gate_up[place, F_:], "down": down[place]}
            for part, into in parts.items():
                name = self._expert_name(number, expert, part)
                if self._shapes[name] != into.shape:
                    raise ValueError(f"{self.folder}: {name} is {list(self._shapes[name])}, not {list(into.shape)}")
                into.copy_(read_whole(name, self._stored, self._stored.__getitem__))
        return ExpertWeights(gate_up.to(self.device), down.to(self.device))

    def _read(self, name: str) -> Tensor:
        # A copy: where the file lies in memory, products would depend on how the file aligns its tensors.
        stored = read_whole(name, self._stored, self._stored.__getitem__)
        return stored.to(self.device, torch.float32, copy=True)

    def _around(self, number: int) -> _Around:
        """Of the layer: tokens [B, S, D] -> their mask and rotary table."""
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        config, sees = self.config, self._modules.sees
        if sees == "types":
            slides = config.layer_types[self._stock.origin[number]] == "sliding_attention"
        else:
            slides = sees == "window" and config.sliding_window is not None
        mask_of = create_sliding_window_causal_mask if slides else create_causal_mask

        def around(h_BSD: Tensor) -> tuple[Tensor | None, Any]:
            positions_1S = torch.arange(h_BSD.size(1), device=h_BSD.device).unsqueeze(0)
            mask = mask_of(
                config=config,
                inputs_embeds=h_BSD,
                attention_mask=None,
                past_key_values=None,
                position_ids=positions_1S,
            )
            return mask, self._rotary(h_BSD, positions_1S)

        return around


def _check_config(stock: StockFolder) -> None:
    """Raises ValueError where the configuration asks for what is not computed here, or the layers are not its own."""
    config, file = stock.config, stock.config_file
    check_config(config, str(file))
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"{file}: hidden_act: {config['hidden_act']!r} is not the 'silu' of SwiGLU experts")
    base, shape = shape_of_config(config), stock.shape
    fits = len(stock.origin) == shape.layers and all(0 <= layer < base.layers for layer in stock.origin)
    for layer, source in enumerate(stock.origin if fits else ()):
        fits = fits and 0 <= shape.experts[layer] <= base.experts[source]
        fits = fits and (layer not in shape.dense or source in base.dense)
    if not fits:
        raise ValueError(f"{stock.path}: its layers or experts are not some of those in {file.name}")


def _in_transformers(config: Mapping[str, Any], family: str) -> tuple[Any, Any]:
    """The configuration in the family's class, and the module with the others."""
    try:
        classes = import_module(f"transformers.models.{family}.modeling_{family}")
        configs = import_module(f"transformers.models.{family}.configuration_{family}")
    except ImportError as error:
        raise ImportError(f"{family} checkpoints need transformers 5; pip install 'wastenot[hf]'") from error
    made = getattr(configs, f"{MODULES[family].classes}Config").from_dict(dict(config))
    made._attn_implementation = "sdpa"
    return made, classes
