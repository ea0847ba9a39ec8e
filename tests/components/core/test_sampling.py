"""Sampling against transformers' own generation, a scoring forward, and exact probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tutelage.components.core import sampling
from tutelage.components.core.config import SamplingConfig
from tutelage.components.core.errors import TrainingError
from tutelage.components.core.sampling import draw, sample, truncate

PROMPTS: list[tuple[int, ...]] = [(1, 40, 41), (1, 7), (1, 30, 31, 32, 33, 34, 35, 36), (1,), (1, 12, 13), (1, 50)]
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0)


def generated(model: Any, prompt: tuple[int, ...], end: int, length: int = 12) -> tuple[int, ...]:
    output = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=length, eos_token_id=end, pad_token_id=3
    )
    return tuple(output[0, len(prompt) :].tolist())


@torch.no_grad()
def frequent_token(model: Any) -> int:
    """A token that ends some greedy answers early, some later and some never, so that rows leave at different steps."""
    answers = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        answers.append(tokens[len(prompt) :])
    places = {token: {answer.index(token) if token in answer else -1 for answer in answers} for token in range(64)}
    return next(token for token, found in places.items() if -1 in found and len(found) > 3)


def architectures() -> dict[str, Callable[[], Any]]:
    """Rotary positions, absolute positions, and a sliding window shorter than the sequences with capped logits."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

    small: dict[str, Any] = {"vocab_size": 64, "initializer_range": 0.3}
    gemma: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    return {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**small, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
        "gemma2": lambda: Gemma2ForCausalLM(
            Gemma2Config(**small, **gemma, sliding_window=5, final_logit_softcapping=5.0, tie_word_embeddings=False)
        ),
    }


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def model(request: pytest.FixtureRequest, llama: Callable[..., Any]) -> Any:
    if request.param == "llama":
        return llama(3)
    torch.manual_seed(4)
    return architectures()[request.param]().eval()


# Greedy


def test_greedy_is_what_generate_gives_one_prompt_at_a_time(model: Any) -> None:
    end = frequent_token(model)
    found = sample(model, PROMPTS, GREEDY, end=end, seed=0)
    for prompt, (one,) in zip(PROMPTS, found, strict=True):
        assert one.tokens == generated(model, prompt, end)
        assert one.ended == (one.tokens[-1] == end)
        assert end not in one.tokens[:-1]
        assert len(one.tokens) == 12 or one.ended
    assert {one.ended for (one,) in found} == {True, False}


@pytest.mark.parametrize("rows", [1, 2, 4, 256])
def test_greedy_does_not_depend_on_who_shares_the_batch(model: Any, rows: int) -> None:
    end = frequent_token(model)
    config = SamplingConfig(max_new_tokens=12, temperature=0, rows=rows)
    together = sample(model, PROMPTS, config, end=end, seed=0)
    for prompt, (one,) in zip(PROMPTS, together, strict=True):
        ((alone,),) = sample(model, [prompt], config, end=end, seed=0)
        assert one.tokens == alone.tokens
        assert one.logps == pytest.approx(alone.logps, abs=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["at once", "half", "never"])
def test_rows_that_leave_do_not_change_the_others(
    llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    model = llama(3)
    end = frequent_token(model)
    wanted = sample(model, PROMPTS, GREEDY, end=end, seed=0, n=2)
    monkeypatch.setattr(sampling, "LEAVE_SHARE", share)
    found = sample(model, PROMPTS, GREEDY, end=end, seed=0, n=2)
    for one, other in zip(found, wanted, strict=True):
        assert [(row.tokens, row.ended) for row in one] == [(row.tokens, row.ended) for row in other]
        for row, expected in zip(one, other, strict=True):
            assert row.logps == pytest.approx(expected.logps, abs=1e-4)


def test_a_greedy_log_prob_is_at_temperature_one(llama: Callable[..., Any]) -> None:
    model = llama(3)
    ((one,),) = sample(model, [PROMPTS[0]], SamplingConfig(max_new_tokens=1, temperature=0), end=2, seed=0)
    logps = torch.log_softmax(model(torch.tensor([PROMPTS[0]])).logits[0, -1].detach(), -1)
    assert one.tokens == (int(logps.argmax()),)
    assert one.logps[0] == pytest.approx(float(logps.max()), abs=1e-5)


# Log-probs, seeds, counts


@pytest.mark.parametrize(
    "values", [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 5}, {"top_p": 0.6}], ids=str
)
def test_logps_are_those_of_a_scoring_forward_at_that_temperature(model: Any, values: dict[str, Any]) -> None:
    """Over the whole vocabulary, also where the draw was from a part of it."""
    config = SamplingConfig(max_new_tokens=10, **values)
    found = sample(model, PROMPTS, config, end=frequent_token(model), seed=1, n=3)
    for prompt, samples in zip(PROMPTS, found, strict=True):
        for one in samples:
            assert one.logps == pytest.approx(scored(model, prompt, one.tokens, config.temperature), abs=1e-4)


@torch.no_grad()
def scored(model: Any, prompt: tuple[int, ...], tokens: tuple[int, ...], temperature: float) -> list[float]:
    """Log-probs of `tokens` after `prompt`, by one forward over both without a cache."""
    logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logps = torch.log_softmax(logits.double() / temperature, -1)
    return logps.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1).tolist()


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_samples_do_not_depend_on_who_shares_the_batch(llama: Callable[..., Any], rows: int) -> None:
    model = llama(3)
    end = frequent_token(model)
    wanted = sample(model, PROMPTS, SamplingConfig(max_new_tokens=12), end=end, seed=5, n=2)
    found = sample(model, PROMPTS, SamplingConfig(max_new_tokens=12, rows=rows), end=end, seed=5, n=2)
    assert [[one.tokens for one in samples] for samples in found] == [
        [one.tokens for one in samples] for samples in wanted
    ]
    assert len({one.ended for samples in wanted for one in samples}) == 2


def test_bfloat16_weights_give_float32_log_probs_of_their_own_logits(llama: Callable[..., Any]) -> None:
    model = llama(3).to(torch.bfloat16)
    config = SamplingConfig(max_new_tokens=1)
    ((one,),) = sample(model, [PROMPTS[0]], config, end=2, seed=0)
    assert one.logps == pytest.approx(scored(model, PROMPTS[0], one.tokens, 1.0), abs=1e-6)


def test_outputs_that_are_not_numbers_are_refused(llama: Callable[..., Any]) -> None:
    model = llama(3)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(TrainingError, match="not numbers"):
        sample(model, PROMPTS, SamplingConfig(max_new_tokens=3), end=2, seed=0)


def test_the_same_seed_gives_the_same_samples(llama: Callable[..., Any]) -> None:
    model, config = llama(3), SamplingConfig(max_new_tokens=10)
    first = sample(model, PROMPTS, config, end=2, seed=7, n=2)
    torch.manual_seed(123)
    assert sample(model, PROMPTS, config, end=2, seed=7, n=2) == first
    assert sample(model, PROMPTS, config, end=2, seed=8, n=2) != first
    state = torch.random.get_rng_state()
    sample(model, PROMPTS, config, end=2, seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_n_different_samples_per_prompt_in_the_prompts_order(llama: Callable[..., Any]) -> None:
    """A model that repeats its first token would answer each prompt with itself: the samples come back in order."""
    model = echo(llama(3))
    prompts = [(20, 21), (5,), (33, 34, 35), (6,)]
    config = SamplingConfig(max_new_tokens=4, temperature=0.01, rows=4)
    found = sample(model, prompts, config, end=2, seed=0, n=3)
    assert [len(samples) for samples in found] == [3, 3, 3, 3]
    for prompt, samples in zip(prompts, found, strict=True):
        assert [one.tokens for one in samples] == [(prompt[-1],) * 4] * 3
    varied = sample(llama(3), prompts, SamplingConfig(max_new_tokens=8), end=2, seed=0, n=3)
    assert all(len({one.tokens for one in samples}) == 3 for samples in varied)


def echo(model: Any) -> Any:
    """Makes the model predict the token that it just read."""
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.nn.functional.one_hot(torch.arange(64) % 32, 32) * 9.0)
        model.model.embed_tokens.weight[32:] *= -1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    return model


def test_more_samples_than_rows(llama: Callable[..., Any]) -> None:
    found = sample(llama(3), PROMPTS[:2], SamplingConfig(max_new_tokens=2, rows=3), end=2, seed=0, n=5)
    assert [len(samples) for samples in found] == [5, 5]


def test_no_prompts_give_no_samples(llama: Callable[..., Any]) -> None:
    assert sample(llama(3), [], GREEDY, end=2, seed=0) == []


def test_sampling_leaves_nothing_that_training_trips_over(llama: Callable[..., Any]) -> None:
    model = llama(3)
    sample(model, PROMPTS, GREEDY, end=2, seed=0)
    model(torch.tensor([PROMPTS[0]])).logits.sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


# Distribution


def naive_truncate(probabilities: list[float], top_k: int, top_p: float) -> list[float]:
    """Keep the k likeliest, renormalise; then walk down until top_p is reached, renormalise."""
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    if top_k:
        order = order[:top_k]
    total = sum(probabilities[token] for token in order)
    kept, reached = [], 0.0
    for token in order:
        if top_p < 1 and reached >= top_p:
            break
        kept.append(token)
        reached += probabilities[token] / total
    total = sum(probabilities[token] for token in kept)
    return [probabilities[token] / total if token in kept else 0.0 for token in range(len(probabilities))]


@pytest.mark.parametrize("top_k", [0, 1, 3, 10, 64, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.1, 1e-6])
def test_truncation_is_that_of_a_naive_walk(top_k: int, top_p: float) -> None:
    logits = torch.randn(5, 64, generator=torch.Generator().manual_seed(top_k), dtype=torch.double) * 2
    logps = logits.log_softmax(-1)
    given = logps.clone()
    kept = truncate(logps, top_k, top_p).softmax(-1)
    assert torch.equal(logps, given)
    for row in range(5):
        wanted = naive_truncate(logps[row].exp().tolist(), top_k, top_p)
        assert kept[row].tolist() == pytest.approx(wanted, abs=1e-12)


def test_truncation_by_hand() -> None:
    logps = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept: Callable[[int, float], list[bool]] = lambda k, p: torch.isfinite(truncate(logps, k, p))[0].tolist()  # noqa: E731
    assert kept(0, 1.0) == [True] * 4
    assert kept(2, 1.0) == [True, True, False, False]
    assert kept(0, 0.6) == [True, True, False, False]
    assert kept(0, 0.49) == [True, False, False, False]
    # Of the three likeliest, 0.5/0.95 and 0.3/0.95 together reach 0.84.
    assert kept(3, 0.84) == [True, True, False, False]
    assert kept(3, 0.85) == [True, True, True, False]


@pytest.mark.parametrize("vocabulary", [3, 128, 300, 1000])
def test_a_draw_is_where_the_cumulative_distribution_passes_the_uniform_number(vocabulary: int) -> None:
    logits = torch.randn(400, vocabulary, generator=torch.Generator().manual_seed(1)) * 3
    logits[:, 1] = -torch.inf
    uniforms = torch.linspace(0, 1, 401, dtype=torch.double)[:-1]
    tokens, logps = draw(logits, SamplingConfig(temperature=0.5), uniforms)
    exact = torch.log_softmax(logits.double() / 0.5, -1)
    edges = exact.exp().cumsum(-1)
    assert logps.dtype == torch.float32
    assert logps.tolist() == pytest.approx(exact.gather(1, tokens.unsqueeze(1)).squeeze(1).tolist(), abs=1e-5)
    above = edges.gather(1, tokens.unsqueeze(1)).squeeze(1)
    below = above - exact.exp().gather(1, tokens.unsqueeze(1)).squeeze(1)
    assert bool((below <= uniforms + 1e-6).all())
    assert bool((uniforms <= above + 1e-6).all())


@pytest.mark.parametrize("edge", [0.0, 1.0 - 2.0**-53])
def test_no_uniform_number_finds_a_token_without_probability(edge: float) -> None:
    logits = torch.zeros(64, 500)
    logits[:, :200] = -torch.inf
    logits[:, 300:] = -1000.0  # which is 0 in float32
    tokens, _ = draw(logits, SamplingConfig(), torch.full((64,), edge, dtype=torch.double))
    assert set(tokens.tolist()) == {200 if edge == 0.0 else 299}
    tokens, _ = draw(logits, SamplingConfig(top_k=1), torch.full((64,), edge, dtype=torch.double))
    assert bool(((tokens >= 200) & (tokens < 300)).all())


@pytest.mark.parametrize(
    "values", [{}, {"temperature": 0.5}, {"temperature": 1.5, "top_k": 8}, {"top_p": 0.7}], ids=str
)
def test_frequencies_are_the_models_probabilities(llama: Callable[..., Any], values: dict[str, Any]) -> None:
    """Chi-square of 6,000 draws of the second token, after every first one, against exact probabilities."""
    model, prompt, n = llama(3), (1, 40), 6000
    config = SamplingConfig(max_new_tokens=2, rows=n, **values)
    (found,) = sample(model, [prompt], config, end=2, seed=11, n=n)

    def probabilities(before: Tensor) -> Tensor:
        logits = model(before).logits[:, -1].double() / config.temperature
        rows = [naive_truncate(row, config.top_k, config.top_p) for row in logits.softmax(-1).tolist()]
        return torch.tensor(rows, dtype=torch.double)

    with torch.no_grad():
        first = probabilities(torch.tensor([prompt]))[0]
        second = probabilities(torch.tensor([[*prompt, token] for token in range(64)]))
    joint = first.unsqueeze(1) * second
    joint[2] = 0.0  # the end token: nothing follows
    wanted = torch.cat([joint.flatten(), first[2:3]]) * n
    counts = torch.zeros_like(wanted)
    for one in found:
        counts[-1 if one.ended and len(one.tokens) == 1 else one.tokens[0] * 64 + one.tokens[1]] += 1
    assert not counts[wanted == 0].any()
    often = wanted >= 5
    observed = torch.cat([counts[often], counts[~often].sum().view(1)])
    expected = torch.cat([wanted[often], wanted[~often].sum().view(1)])
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    assert freedom > 5
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)
