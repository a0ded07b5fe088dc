"""Generation over expert-parallel ranks gives the texts of one process, and ranks never part ways."""

from __future__ import annotations

import torch
from spawned import run_ranks

from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import Decoder, DecoderOutput, build_decoder
from wastenot.moe.generate import generate
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.mesh import Mesh, make_mesh, single

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8]]


def tiny(mesh: Mesh) -> Decoder:
    config = ModelConfig(
        vocab_size=40, d_model=32, layers=2, heads=4, init_std=0.2, moe=MoEConfig(experts=8, d_expert=16)
    )
    return build_decoder(config, RouterConfig(top_k=2, capacity_factor=1.0), mesh)


def flip(module: Decoder, args: tuple, output: DecoderOutput) -> None:
    output.hidden_BSD.neg_()


def texts(rank: int, world: int, expert: int, disagree: bool) -> list[list[list[int]]]:
    model = tiny(make_mesh(ParallelConfig(expert=expert), "cpu"))
    greedy = generate(model, PROMPTS, max_new_tokens=6, temperature=0)
    end = greedy[0][3]
    if disagree and rank == 1:
        # As if the last bits of its logits had tipped its choice: on its own it would not stop with rank 0.
        model.register_forward_hook(flip)
    return [greedy, generate(model, PROMPTS, max_new_tokens=6, temperature=0, end_token=end)]


def test_expert_parallel_texts_are_those_of_one_process() -> None:
    model = tiny(single())
    greedy = generate(model, PROMPTS, max_new_tokens=6, temperature=0)
    stopped = generate(model, PROMPTS, max_new_tokens=6, temperature=0, end_token=greedy[0][3])
    # Two copies of the experts, each on two ranks.
    assert run_ranks(4, texts, 2, False) == [[greedy, stopped]] * 4


def test_ranks_whose_logits_differ_still_stop_together() -> None:
    first, second = run_ranks(2, texts, 2, True)
    assert first == second


def samples(rank: int, world: int) -> list[list[int]]:
    torch.manual_seed(rank)
    return generate(tiny(make_mesh(ParallelConfig(expert=world), "cpu")), PROMPTS, max_new_tokens=8, seed=3, top_p=0.9)


def test_samples_agree_over_ranks() -> None:
    expected = generate(tiny(single()), PROMPTS, max_new_tokens=8, seed=3, top_p=0.9)
    assert run_ranks(2, samples) == [expected] * 2
