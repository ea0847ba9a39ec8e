"""Sampling continuations: a prompt is read once, its cache cloned for n samples, and finished rows leave the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tutelage.components.core.config import SamplingConfig

# Finished rows leave once they are that share of the batch: moving the cache costs about as much as it saves before.
LEAVE_SHARE = 0.125


@dataclass(frozen=True, slots=True)
class Sampled:
    """A continuation. logps are log pi(token | before) at the sampling temperature, over the whole vocabulary.

    tokens include the end token if `ended`.
    """

    tokens: tuple[int, ...]
    logps: tuple[float, ...]
    ended: bool


@torch.inference_mode()
def sample(
    model: Any, prompts: Sequence[tuple[int, ...]], config: SamplingConfig, *, end: int, seed: int, n: int = 1
) -> list[list[Sampled]]:
    """n continuations of each prompt, in the prompts' order. The same seed gives the same continuations.

    model: a causal language model with a key-value cache. prompts: non-empty token tuples. end: end token id.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    found: list[list[Sampled]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    size = max(1, config.rows // n)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        rows = _continue([prompts[index] for index in chosen], model, config, end, n, generator, device)
        for position, index in enumerate(chosen):
            found[index] = rows[position * n : (position + 1) * n]
    return found


def _continue(
    prompts: list[tuple[int, ...]],
    model: Any,
    config: SamplingConfig,
    end: int,
    n: int,
    generator: torch.Generator,
    device: torch.device,
) -> list[Sampled]:
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), end, dtype=torch.long)
    attention = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention[row, width - len(prompt) :] = 1
    input_ids, attention = input_ids.to(device), attention.to(device)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache()
    # Prompts of one length need no mask: attention is causal as it stands.
    padded = bool(min(map(len, prompts)) < width)
    output = model(
        input_ids=input_ids,
        attention_mask=attention if padded else None,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits = output.logits[:, -1].repeat_interleave(n, 0)
    if n > 1:
        cache.batch_repeat_interleave(n)
    attention, position = attention.repeat_interleave(n, 0), positions[:, -1].repeat_interleave(n, 0)

    rows = torch.arange(logits.shape[0], device=device)
    length = config.max_new_tokens
    tokens = torch.full((logits.shape[0], length), end, dtype=torch.long, device=device)
    logps = torch.zeros((logits.shape[0], length), device=device)
    lengths = torch.full((logits.shape[0],), length, dtype=torch.long, device=device)
    ended = torch.zeros(logits.shape[0], dtype=torch.bool, device=device)
    for step in range(length):
        token, logp = _draw(logits.float(), config, generator)
        # What an ended row draws on is cut off by its length.
        tokens[rows, step], logps[rows, step] = token, logp
        stops = ~ended[rows] & (token == end)
        lengths[rows] = torch.where(stops, step + 1, lengths[rows])
        ended[rows] |= stops
        keep = ~ended[rows]
        remaining = int(keep.sum())
        if remaining == 0 or step == length - 1:
            break
        if remaining <= (1 - LEAVE_SHARE) * len(rows):
            kept = keep.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            rows, token, attention, position = rows[kept], token[kept], attention[kept], position[kept]
        position = position + 1
        attention = torch.cat([attention, attention.new_ones((len(rows), 1))], 1)
        output = model(
            input_ids=token.unsqueeze(1),
            attention_mask=attention if padded else None,
            position_ids=position.unsqueeze(1),
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]
    return [
        Sampled(tuple(row[:count]), tuple(values[:count]), done)
        for row, values, count, done in zip(
            tokens.tolist(), logps.tolist(), lengths.tolist(), ended.tolist(), strict=True
        )
    ]


def _draw(logits: Tensor, config: SamplingConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """logits [R,V] to tokens [R] and their log-probs [R] at the sampling temperature (1 where it is 0)."""
    logps = torch.log_softmax(logits / (config.temperature or 1.0), -1)
    if config.temperature == 0:
        token = logps.argmax(-1)
    else:
        allowed = truncate(logps, config.top_k, config.top_p)
        token = torch.multinomial(allowed.exp(), 1, generator=generator).squeeze(1)
    return token, logps.gather(1, token.unsqueeze(1)).squeeze(1)


def truncate(logps: Tensor, top_k: int, top_p: float) -> Tensor:
    """logps [R,V] with -inf outside the top_k likeliest tokens and outside the smallest set of probability top_p."""
    if top_k and top_k < logps.shape[-1]:
        floor = logps.topk(top_k, -1).values[:, -1:]
        logps = logps.masked_fill(logps < floor, -torch.inf)
    if top_p < 1.0:
        values, order = logps.softmax(-1).sort(-1, descending=True)
        # A token stays if those before it have less than top_p together: the likeliest always does.
        gone = (values.cumsum(-1) - values) >= top_p
        logps = logps.masked_fill(torch.zeros_like(gone).scatter(1, order, gone), -torch.inf)
    return logps
