"""Supervised fine-tuning: demonstrations in, a policy out. Also trains a model from nothing, where asked to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, model_validator

from tutelage.components.core.config import Architecture, StageConfig, TrainingConfig
from tutelage.components.core.errors import ConfigError

if TYPE_CHECKING:
    from tutelage.components.core.context import StageContext


class Config(StageConfig):
    """One of `model_uri` and `architecture` says what is trained."""

    model_uri: str = Field("", description="Directory, s3:// or models:/ URI, or hub id of the base model.")
    architecture: Architecture | None = Field(None, description="Train a model of this shape from nothing instead.")
    ignore_prompts: bool = Field(False, description="Learn the responses alone, as plain text.")
    max_tokens: int = Field(512, ge=8, description="Longest prompt with response, in tokens.")
    seed: int = 0
    weights: Literal["float32", "bfloat16"] = Field("float32", description="Precision of the saved weights.")
    trust_remote_code: bool = False
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _one_source(self) -> Config:
        if bool(self.model_uri) == (self.architecture is not None):
            raise ValueError("give either model_uri or architecture")
        if self.architecture is not None and self.training.lora is not None:
            raise ValueError("training.lora adapts a model that is there: with architecture, train all weights")
        return self


class Result(BaseModel):
    """steps: optimizer steps. Losses are nats per response token at the end of training, or None without data."""

    steps: int
    train_loss: float
    eval_loss: float | None
    demonstrations: int


def run(config: Config, context: StageContext, *, dataset: Path, policy: Path) -> Result:
    """dataset: of data preparation. policy: directory to write.

    Raises ConfigError, DataError, ArtifactError, TrainingError.
    """
    if config.architecture is not None and config.max_tokens > config.architecture.context:
        raise ConfigError(
            f"max_tokens {config.max_tokens} exceeds architecture.context {config.architecture.context}",
            where="sft configuration",
        )
    with context.phase("imports"):
        from tutelage.components.sft.train import train
    return train(config, context, dataset=dataset, policy=policy)
