"""Generation: the cache changes nothing, neighbours change nothing, draws follow the probabilities."""

from __future__ import annotations

import pytest
import torch

from wastenot.moe.attention import KVCache
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import Decoder, build_decoder
from wastenot.moe.generate import generate, sample
from wastenot.parallel.mesh import single

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8], [30, 30]]
VOCAB = 40


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(qk_norm: str = "none", capacity_factor: float | None = None, backend: str = "auto", **moe: int) -> Decoder:
    """Two layers whose weights are large enough that next tokens differ clearly."""
    config = ModelConfig(
        vocab_size=VOCAB,
        d_model=32,
        layers=2,
        heads=4,
        kv_heads=2,
        qk_norm=qk_norm,  # type: ignore[arg-type]
        init_std=0.2,
        moe=MoEConfig(experts=8, d_expert=16, **moe),
    )
    router = RouterConfig(top_k=2, capacity_factor=capacity_factor)
    return build_decoder(config, router, single(), backend=backend)  # type: ignore[arg-type]


@torch.no_grad()
def uncached(model: Decoder, tokens: list[int]) -> torch.Tensor:
    return model.logits(model(torch.tensor([tokens])).hidden_BSD)[0]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
def test_cached_logits_equal_a_full_forward_for_unequal_prompts(qk_norm: str, backend: str) -> None:
    """Prompts padded into one batch, then one token, then three at once."""
    model = tiny(qk_norm, backend=backend, shared_experts=1, first_dense=1)
    longest = max(map(len, PROMPTS))
    padding = torch.tensor([longest - len(p) for p in PROMPTS])
    batch = torch.tensor([[VOCAB - 1] * (longest - len(p)) + p for p in PROMPTS])
    follow = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34], [0, 1, 2, 3]])
    cache = KVCache.empty(model.config, padding, longest + 4, torch.float32)
    with torch.no_grad():
        parts = [model.logits(model(x, cache).hidden_BSD) for x in (batch, follow[:, :1], follow[:, 1:])]
    cached = torch.cat(parts, 1)
    for row, prompt in enumerate(PROMPTS):
        expected = uncached(model, prompt + follow[row].tolist())
        torch.testing.assert_close(cached[row, int(padding[row]) :], expected, atol=1e-5, rtol=1e-5)


def test_greedy_in_a_batch_equals_greedy_alone() -> None:
    model = tiny()
    together = generate(model, PROMPTS, max_new_tokens=12, temperature=0)
    alone = [generate(model, [prompt], max_new_tokens=12, temperature=0)[0] for prompt in PROMPTS]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == len(PROMPTS), "the prompts should matter"


def test_greedy_takes_the_likeliest_token_at_every_step() -> None:
    model = tiny()
    tokens = list(PROMPTS[0])
    for expected in generate(model, [tokens], max_new_tokens=6, temperature=0)[0]:
        assert expected == int(uncached(model, tokens)[-1].argmax())
        tokens.append(expected)


def test_generation_lifts_the_capacity() -> None:
    """Same weights with slots for a quarter of the choices: training drops tokens, generation does not."""
    limited, free = tiny(capacity_factor=0.25), tiny()
    assert generate(limited, PROMPTS, max_new_tokens=8, temperature=0) == generate(
        free, PROMPTS, max_new_tokens=8, temperature=0
    )
    with torch.no_grad():
        assert any(
            routing.counts_BE.sum() < routing.slots_TK.numel() for routing in limited(torch.tensor([[1] * 16])).routings
        )


def test_a_seed_decides_the_text_and_the_rest_of_the_batch_does_not() -> None:
    model = tiny()
    first = generate(model, PROMPTS, max_new_tokens=10, seed=1)
    assert first == generate(model, PROMPTS, max_new_tokens=10, seed=1)
    assert first != generate(model, PROMPTS, max_new_tokens=10, seed=2)
    assert first[:2] == generate(model, PROMPTS[:2], max_new_tokens=10, seed=1)


def test_the_end_token_stops_a_text_and_is_left_out() -> None:
    model = tiny()
    whole = generate(model, PROMPTS, max_new_tokens=12, temperature=0)
    end = whole[0][3]
    stopped = generate(model, PROMPTS, max_new_tokens=12, temperature=0, end_token=end)
    for tokens, cut in zip(whole, stopped, strict=True):
        assert cut == tokens[: tokens.index(end) if end in tokens else None]
    assert len(stopped[0]) <= 3


def test_generation_ends_when_all_texts_have() -> None:
    model = tiny()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    end = generate(model, [PROMPTS[0]], max_new_tokens=4, temperature=0)[0][0]
    calls.clear()
    assert generate(model, [PROMPTS[0]], max_new_tokens=50, temperature=0, end_token=end) == [[]]
    assert len(calls) == 1


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = tiny().train(training)
    generate(model, PROMPTS, max_new_tokens=2)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_prompts_give_no_texts() -> None:
    assert generate(tiny(), [], max_new_tokens=3) == []


LOGITS = torch.tensor([2.0, 0.0, 1.0, -1.0]).log_softmax(-1)


def draws(**options: float) -> torch.Tensor:
    """How often each of four tokens is drawn by 10,000 evenly spaced numbers."""
    count = 10_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    given = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | options
    tokens = sample(LOGITS.expand(count, -1), uniform, **given)  # type: ignore[arg-type]
    return tokens.bincount(minlength=4) / count


def test_draws_follow_the_probabilities() -> None:
    torch.testing.assert_close(draws(), LOGITS.softmax(-1), atol=2e-4, rtol=0)


def test_temperature_sharpens() -> None:
    torch.testing.assert_close(draws(temperature=0.5), (LOGITS / 0.5).softmax(-1), atol=2e-4, rtol=0)


def test_temperature_zero_takes_the_best() -> None:
    assert draws(temperature=0).tolist() == [1, 0, 0, 0]


def test_top_k_leaves_the_best_k() -> None:
    best_two = LOGITS.exp() * torch.tensor([1, 0, 1, 0])
    torch.testing.assert_close(draws(top_k=2), best_two / best_two.sum(), atol=2e-4, rtol=0)


def test_top_p_leaves_the_fewest_tokens_that_reach_it() -> None:
    """Probabilities are 0.64, 0.09, 0.24, 0.03: half needs the best one, 0.7 the best two, 0.9 three."""
    assert (draws(top_p=0.5) > 0).tolist() == [True, False, False, False]
    assert (draws(top_p=0.7) > 0).tolist() == [True, False, True, False]
    assert (draws(top_p=0.9) > 0).tolist() == [True, True, True, False]


def test_the_largest_draw_stays_inside() -> None:
    nearly_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    for options in ({"top_p": 1.0, "top_k": 0}, {"top_p": 0.7, "top_k": 0}, {"top_p": 1.0, "top_k": 1}):
        assert 0 <= int(sample(LOGITS.unsqueeze(0), nearly_one, 1.0, **options)) < 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[1], []]}, "prompts: number 1 is empty"),
        ({"prompts": [[1, 40]]}, "prompts: token 40 of number 0 is outside the vocabulary of 40"),
        ({"prompts": [[-1]]}, "prompts: token -1"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 is too small"),
        ({"temperature": -0.1}, "temperature: -0.1 is negative"),
        ({"top_p": 0.0}, "top_p: 0.0 is outside"),
        ({"top_p": 1.1}, "top_p: 1.1 is outside"),
        ({"top_k": -1}, "top_k: -1 is negative"),
    ],
)
def test_what_cannot_be_generated_is_refused(options: dict, message: str) -> None:
    given = {"prompts": [[1]], "max_new_tokens": 2} | options
    with pytest.raises(ValueError, match=message):
        generate(tiny(), given.pop("prompts"), **given)
