"""What the training benchmark runs: rows, sizes and the settings that differ between devices."""

from __future__ import annotations

from dataclasses import dataclass

COLUMNS = ["ours", "trl_shipped", "trl_tuned"]


@dataclass(frozen=True)
class Row:
    """A line of the table. batches, sizes: steps and examples per step, by model; of an online row, rollouts per step.

    group: samples per prompt. beta: of DPO, or the coefficient of the KL penalty.
    """

    name: str
    source: str
    learning_rate: float
    sizes: dict[str, tuple[int, int]]
    beta: float = 0.1
    group: int = 1

    def steps(self, model: str) -> int:
        return self.sizes[model][0]

    def batch(self, model: str) -> int:
        return self.sizes[model][1]

    def examples_per_step(self, model: str) -> int:
        """Records that a step takes from the data set."""
        return self.batch(model) // self.group


PAIRS = {"small": (8, 32), "large": (4, 16), "0.5b": (10, 64), "1.5b": (8, 64)}
ROLLOUTS = {"small": (3, 64), "large": (2, 32), "0.5b": (4, 128), "1.5b": (3, 128)}

ROWS = [
    Row("sft", "gsm8k_demos", 3e-4, {"small": (12, 32), "large": (5, 16), "0.5b": (20, 64), "1.5b": (15, 64)}),
    Row("reward_model", "gsm8k_pairs", 1e-4, PAIRS),
    Row("dpo", "gsm8k_pairs", 1e-4, PAIRS),
    Row("dpo_ratings", "rated_pairs", 1e-4, {**PAIRS, "small": (16, 32)}),
    Row("rloo", "gsm8k_prompts", 1e-4, ROLLOUTS, beta=0.05, group=8),
    Row("grpo", "gsm8k_prompts", 1e-4, ROLLOUTS, beta=0.0, group=8),
]


@dataclass(frozen=True)
class Device:
    """trl_rows: examples per forward that made TRL tuned fastest; pairs count once. precision: the default."""

    models: list[str]
    precision: str
    micro_batch_tokens: int
    max_new_tokens: int
    trl_rows: dict[str, int]


DEVICES = {
    "cpu": Device(
        ["small", "large"], "fp32", 1024, 96,
        {"sft": 4, "reward_model": 4, "dpo": 2, "dpo_ratings": 8, "rloo": 8, "grpo": 8},
    ),
    "cuda": Device(
        ["0.5b", "1.5b"], "bf16", 32768, 256,
        {"sft": 32, "reward_model": 32, "dpo": 16, "dpo_ratings": 32, "rloo": 32, "grpo": 32},
    ),
}  # fmt: skip
