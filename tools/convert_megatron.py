"""`wastenot convert from-megatron`: a checkpoint of Megatron-Core's as a run, without Megatron and without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..launch.config import DataConfig, LogConfig, TrainConfig
from ..launch.engine_config import DeepSpeedConfig, MegatronConfig
from ..launch.env import Rank, pick_device
from ..launch.errors import UserError
from ..launch.run_folder import RunFolder
from ..launch.saved_run import blank_decoder, write_run
from ..launch.settings import as_mapping, parse_config
from ..launch.strict_yaml import read_yaml
from ..launch.tokenizer import FILE_NAME, load_tokenizer
from ..moe.adapters.megatron_checkpoint import MegatronCheckpoint
from ..moe.adapters.megatron_config import config_from_megatron
from ..parallel.mesh import single


def from_megatron(source: Path, target: Path, tokenizer: str | None, config: str | None) -> dict[str, Any]:
    """Writes the checkpoint `source` as a run with one checkpoint, of step 0; what was written.

    source: a folder of format torch_dist, of one iteration or the one above.
    tokenizer: a tokenizer.json, or its folder.
    config: YAML whose `model` and `router` describe what was trained; None: the options that Megatron-LM saved with it.
    Raises UserError where a part is missing, or the weights are not those of such a model.
    """
    if tokenizer is None:
        raise UserError("--tokenizer: Megatron's checkpoints hold none; name the tokenizer.json it was trained with")
    words = load_tokenizer(tokenizer)
    try:
        checkpoint = MegatronCheckpoint(source)
        described = _described(checkpoint, config)
        vocab_size = checkpoint.vocabulary()
        if vocab_size < words.vocab_size:
            raise ValueError(
                f"--tokenizer: has {words.vocab_size} tokens, and the embedding {vocab_size} rows; name the one it was "
                "trained with"
            )
        described = replace(
            described,
            engine="native",
            megatron=MegatronConfig(),
            deepspeed=DeepSpeedConfig(),
            model=replace(described.model, vocab_size=vocab_size),
            data=replace(described.data, tokenizer=str(RunFolder(target).tokenizer / FILE_NAME)),
            log=LogConfig(dir=str(target)),
        )
        # Rules that span owners, as for a file.
        described = parse_config(as_mapping(described), str(source))
        model = blank_decoder(described, single(pick_device(Rank())), described.router)
        checkpoint.load_into(model)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    write_run(described, model, words, str(checkpoint.folder))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"target": str(target), "family": "megatron", "parameters": parameters}


def _described(checkpoint: MegatronCheckpoint, config: str | None) -> TrainConfig:
    """The configuration of the model, its vocabulary and places still to be filled in."""
    if config is not None:
        # Only described here: it is run elsewhere, where its corpus and devices are.
        return parse_config(read_yaml(Path(config)), config)
    args = checkpoint.args()
    if args is None:
        raise UserError(
            f"{checkpoint.folder}: holds no options of Megatron-LM (common.pt has no `args`); describe the model in a "
            "YAML file with `model` and `router`, and name it with --config"
        )
    model, router = config_from_megatron(args)
    seq_len = args.get("seq_length") or args.get("max_position_embeddings") or 2048
    return TrainConfig(model=model, router=router, data=DataConfig(seq_len=seq_len))
