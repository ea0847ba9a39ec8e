"""Reward modelling: pairs of responses in, a model that scores a response out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, model_validator

from tutelage.components.core.config import StageConfig, TrainingConfig
from tutelage.components.core.registry import check_options

if TYPE_CHECKING:
    from tutelage.components.core.context import StageContext


class Config(StageConfig):
    objective: str = Field("bradley_terry", description="A reward-model objective of the registry.")
    options: dict[str, Any] = Field({}, description="Keyword arguments of the objective.")
    normalise: bool = Field(True, description="Scale rewards to mean 0 and std 1 over the training texts.")
    max_tokens: int = Field(512, ge=8)
    seed: int = 0
    trust_remote_code: bool = False
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _known(self) -> Config:
        check_options("reward-model objective", self.objective, self.options)
        return self


class Result(BaseModel):
    """Losses are means per pair. Accuracy is the share of held-out pairs whose chosen response scores higher.

    Of nothing held out there is neither.
    """

    steps: int
    pairs: int
    train_loss: float
    eval_loss: float | None
    eval_accuracy: float | None


def run(config: Config, context: StageContext, *, dataset: Path, policy: Path, reward_model: Path) -> Result:
    """dataset: of data preparation. policy: the fine-tuned model to start from. reward_model: directory to write.

    Raises DataError, ArtifactError, TrainingError.
    """
    with context.phase("imports"):
        from tutelage.components.reward_model.train import train
    return train(config, context, dataset=dataset, policy=policy, reward_model=reward_model)
