"""A Hugging Face checkpoint as a streamed model: transformers' own modules, one layer of them at a time.

Attention, norms, router and shared experts are the family's modules of transformers (extra `hf`), built on meta for
one layer and filled with that layer's tensors; the experts are stacks of ours. Besides stock folders it reads what
`apply` makes of them: fewer layers, and layers that differ.
"""

from __future__ import annotations

import copy
import json
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
from ..adapters.huggingface import CONFIG, StoredWeights
from .families import FAMILIES, Family, shape_of
from .fingerprint import checkpoint_fingerprint
from .places import Place, name_of, place_of
from .plan import Shape, shape_from
from .reading import chosen_experts, most_choices, share_of
from .streamed import Choice, ExpertWeights, LayerSize

__all__ = ["APPLIED", "BASE_CONFIG", "StockLayer", "StockModel"]

BASE_CONFIG, APPLIED = "base_config.json", "compressed.json"
"""What an applied folder has in place of config.json: the source's, and what became of it."""

_VERSION = 1
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
    _family: Family
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
        """Raises ValueError where `folder` is no checkpoint of a known family, is not whole, or is stored quantized;
        ImportError where transformers is missing."""
        self.folder, self.device = Path(folder), torch.device(device)
        applied = self.folder / APPLIED
        self._plain = _read_json(self.folder / (BASE_CONFIG if applied.is_file() else CONFIG))
        self._applied = _read_json(applied) if applied.is_file() else None
        self.family = _family(self._plain, self.folder)
        self._kind = str(self._plain["model_type"])
        self.config, self._classes = _in_transformers(self._plain, self.family)
        self._base = shape_of(self.config, self.family)
        self.shape, self.origin = _applied(self._applied, self._base, applied)
        self.d_model, self.vocab_size = int(self.config.hidden_size), int(self.config.vocab_size)
        self._rotary = self._class("RotaryEmbedding")(config=self.config).to(self.device)
        self._stored = StoredWeights(self.folder)
        self._check_outside()

    def _class(self, name: str) -> Any:
        return getattr(self._classes, self.family.classes + name)

    def _check_outside(self) -> None:
        """Raises ValueError where tensors outside the layers are missing, or there are others."""
        outside = {_EMBEDDING, _NORM} | (set() if self.config.tie_word_embeddings else {_HEAD})
        # What predicts further tokens stands behind the last layer, and is no part of this model.
        more = int(getattr(self.config, "num_nextn_predict_layers", 0) or 0)
        base = len(self._base.experts)
        for name in self._stored:
            number = re.match(r"model\.layers\.(\d+)\.", name)
            layer = int(number[1]) if number else -1
            if (0 <= layer < self.shape.layers) or (self._applied is None and base <= layer < base + more):
                continue
            # Tied weights may be stored twice.
            if name not in outside and not (name == _HEAD and self.config.tie_word_embeddings):
                raise ValueError(f"{self.folder}: {name} is no tensor of this {self.config.model_type} model")
        if missing := sorted(outside - self._stored.keys()):
            raise ValueError(f"{self.folder}: misses {some(missing)}")

    @property
    def fingerprint(self) -> str:
        """See `StreamedModel`."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return checkpoint_fingerprint(self.folder)

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
        name = _EMBEDDING if self.config.tie_word_embeddings else _HEAD
        return norm.requires_grad_(False), self._read(name)

    def layer(
        self, number: int, kept: Sequence[int] | None = None, share: tuple[int, int] = (0, 1), feed: bool = True
    ) -> StockLayer:
        """See `StreamedModel`."""
        experts = self.shape.experts[number] if feed else 0
        chosen = chosen_experts(number, kept if feed else None, experts, self.shape, self.family.smallest_group)
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
                    f"{list(wanted.shape)} that {CONFIG} asks for"
                )
            tensors[name] = tensor
        module.load_state_dict(tensors, assign=True)
        stacks = self._experts(number, share_of(chosen, share)) if chosen else None
        module.requires_grad_(False).eval()
        return StockLayer(len(chosen), is_dense, stacks, module, self.family, self._around(number))

    @property
    def outside_size(self) -> int:
        """See `StreamedModel`."""
        return sum(self._elements(name) for name in self._stored if place_of(name, self._kind, 10**9).part == "outside")

    @property
    def element_bytes(self) -> int:
        """See `StreamedModel`."""
        return self._stored.dtype_bytes(_EMBEDDING)

    def size(self, number: int) -> LayerSize:
        """See `StreamedModel`."""
        parts = {"attention": 0, "feed": 0, "experts": 0, "router": 0}
        layers = self.shape.layers
        prefix = f"model.layers.{number}."
        for name in self._stored:
            if name.startswith(prefix):
                part = place_of(name, self._kind, layers).part
                kind = {"attention": "attention", "expert": "experts", "router": "router", "router_bias": "router"}
                parts[kind.get(part, "feed")] += self._elements(name)
        experts = self.shape.experts[number]
        width = 0
        if experts or number in self.shape.dense:
            down = Place(number, "expert" if experts else "dense", "down", 0 if experts else None)
            width = self._stored.shape(name_of(down, self._kind))[1]
        per_expert = (parts["experts"] + parts["router"]) // max(1, experts)
        return LayerSize(
            attention=parts["attention"], feed=parts["feed"], expert=per_expert, num_experts=experts, hidden=width
        )

    def _elements(self, name: str) -> int:
        return torch.Size(self._stored.shape(name)).numel()

    def _module(self, number: int, num_experts: int, has_feed: bool) -> nn.Module:
        """The layer in transformers' class, on meta, without experts; where nothing follows attention, that alone."""
        config = copy.deepcopy(self.config)
        if num_experts:
            setattr(config, self.family.num_experts, num_experts)
            # A router of fewer experts than it is to choose would fail, or choose one twice.
            config.num_experts_per_tok = min(self.shape.top_k, most_choices(num_experts, self.shape))
        with torch.device("meta"):
            module = self._class("DecoderLayer")(config, self.origin[number])
        if not has_feed:
            del module.mlp, module.post_attention_layernorm
        elif num_experts:
            del module.mlp.experts
        return module

    def _on_disk(self, number: int, name: str) -> str:
        feed = re.sub(r"^mlp\.", f"{self.family.feed}.", name)
        return f"model.layers.{number}.{feed}"

    def _check_layer(self, number: int) -> None:
        """Raises ValueError unless the layer's tensors are there, all of them and no others."""
        experts, family = self.shape.experts[number], self.family
        module = self._module(number, experts, experts > 0 or number in self.shape.dense)
        wanted = {self._on_disk(number, name) for name in module.state_dict()}
        for part in (family.gate, family.up, family.down):
            wanted |= {family.expert(number, expert, part) for expert in range(experts)}
        prefix = f"model.layers.{number}."
        # Old checkpoints keep a table that follows from the configuration.
        found = {n for n in self._stored if n.startswith(prefix) and not n.endswith("rotary_emb.inv_freq")}
        problems = {"misses": sorted(wanted - found), "has, and should not,": sorted(found - wanted)}
        said = "; ".join(f"{what} {some(names)}" for what, names in problems.items() if names)
        if said:
            raise ValueError(f"{self.folder}: layer {number} {said}")

    def _experts(self, number: int, chosen: Sequence[int]) -> ExpertWeights:
        """Their stacks, read expert by expert."""
        family = self.family
        F_, D = self._stored.shape(family.expert(number, chosen[0], family.gate))
        gate_up = torch.empty(len(chosen), 2 * F_, D)
        down = torch.empty(len(chosen), D, F_)
        for place, expert in enumerate(chosen):
            for part, into in (
                (family.gate, gate_up[place, :F_]),
                (family.up, gate_up[place, F_:]),
                (family.down, down[place]),
            ):
                name = family.expert(number, expert, part)
                stored = self._stored[name]
                if stored.shape != into.shape:
                    raise ValueError(f"{self.folder}: {name} is {list(stored.shape)}, not {list(into.shape)}")
                into.copy_(stored)
        return ExpertWeights(gate_up.to(self.device), down.to(self.device))

    def _read(self, name: str) -> Tensor:
        # A copy: where the file lies in memory, products would depend on how the file aligns its tensors.
        return self._stored[name].to(self.device, torch.float32, copy=True)

    def _around(self, number: int) -> _Around:
        """Of the layer: tokens [B, S, D] -> their mask and rotary table."""
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        config, sees = self.config, self.family.sees
        slides = (sees == "types" and config.layer_types[self.origin[number]] == "sliding_attention") or (
            sees == "window" and config.sliding_window is not None
        )
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent}: has no {path.name}; give a folder of a Hugging Face checkpoint") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is no mapping")
    return value


def _family(config: Mapping[str, Any], folder: Path) -> Family:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{folder}: model_type {kind!r} is no family known here; use one of {', '.join(FAMILIES)}")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{folder}: stores quantized weights (quantization_config); give it in bf16 or fp32")
    if config.get("per_layer_config"):
        raise ValueError(f"{folder}: per_layer_config makes layers differ, which transformers ignores; remove it")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"{folder}: hidden_act {config['hidden_act']!r} is not the 'silu' of SwiGLU experts")
    return FAMILIES[kind]


def _in_transformers(config: Mapping[str, Any], family: Family) -> tuple[Any, Any]:
    """The configuration in the family's class, and the module with the others."""
    kind = config["model_type"]
    try:
        classes = import_module(f"transformers.models.{kind}.modeling_{kind}")
        configs = import_module(f"transformers.models.{kind}.configuration_{kind}")
    except ImportError as error:
        raise ImportError(f"{kind} checkpoints need transformers 5; pip install 'wastenot[hf]'") from error
    made = getattr(configs, f"{family.classes}Config").from_dict(dict(config))
    made._attn_implementation = "sdpa"
    return made, classes


def _applied(applied: Mapping[str, Any] | None, base: Shape, path: Path) -> tuple[Shape, tuple[int, ...]]:
    """Shape and original layer numbers, of a stock folder (None) or an applied one."""
    if applied is None:
        return base, tuple(range(base.layers))
    if applied.get("version") != _VERSION:
        raise ValueError(f"{path}: version {applied.get('version')} is unknown; this version reads {_VERSION}")
    try:
        shape = shape_from(applied["shape"])
        origin = tuple(int(layer) for layer in applied["origin"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: does not say what was applied ({error!r})") from error
    fits = len(origin) == shape.layers and all(0 <= layer < base.layers for layer in origin)
    for layer, source in enumerate(origin if fits else ()):
        fits = fits and 0 <= shape.experts[layer] <= base.experts[source]
        fits = fits and (layer not in shape.dense or source in base.dense)
    if not fits:
        raise ValueError(f"{path}: has layers or experts that {BASE_CONFIG} has not")
    return shape, origin
