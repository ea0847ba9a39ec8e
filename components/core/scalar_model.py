"""A number per position: what reward models and value models are."""

from __future__ import annotations

import math

from torch import Tensor, nn
from transformers import PreTrainedModel

from tutelage.components.core.batches import Batch
from tutelage.components.core.models import scalar_head
from tutelage.components.core.policy import hidden_states, pack


class ScalarModel(nn.Module):
    """A scalar per position: a reward model reads it at the last real token, a value model everywhere.

    `gain` and `bias` normalise the output (details of RLHF with PPO, R3); they are kept in the model's config.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.packed = pack(model)
        self.gain = float(getattr(model.config, "reward_gain", 1.0))
        self.bias = float(getattr(model.config, "reward_bias", 0.0))

    def forward(self, batch: Batch, *, ends: bool = False) -> Tensor:
        """The value at every position [R,T] (anything on padding), or at each row's last token only [R]; float32."""
        hidden = hidden_states(self.model.base_model, batch, self.packed)
        width = batch.rows.shape[1]
        if ends:
            last = batch.ends if self.packed else _row_starts(batch) + batch.lengths - 1
            return self._values(hidden.index_select(0, last))
        values = self._values(hidden)
        return (values.index_select(0, batch.rows.flatten()) if self.packed else values).view(-1, width)

    def normalise(self, mean: float, std: float) -> None:
        """Sets gain and bias so that rewards of this mean and std come out as 0 and 1: g = 1/s, b = -m/s."""
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(f"cannot normalise rewards of mean {mean} and std {std}")
        self.gain, self.bias = self.gain / std, (self.bias - mean) / std
        self.model.config.reward_gain, self.model.config.reward_bias = self.gain, self.bias

    def _values(self, hidden: Tensor) -> Tensor:
        return scalar_head(self.model)(hidden).squeeze(-1).float() * self.gain + self.bias


def _row_starts(batch: Batch) -> Tensor:
    """Where each row begins in the flattened rows: [R]."""
    return batch.lengths.new_tensor(range(0, batch.rows.numel(), batch.rows.shape[1]))
