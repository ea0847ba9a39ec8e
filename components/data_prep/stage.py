"""Raw files to a dataset that training can trust: every row read, checked and split, nothing held out in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from tutelage.components.core.config import StageConfig
from tutelage.components.core.context import StageContext
from tutelage.components.core.errors import DataError
from tutelage.components.core.manifest import write_manifest
from tutelage.components.core.records import Text
from tutelage.components.core.tables import Quarantine
from tutelage.components.data_prep import preferences, ratings
from tutelage.components.data_prep.checks import Admission
from tutelage.components.data_prep.dataset import Dataset
from tutelage.components.data_prep.intake import Intake
from tutelage.components.data_prep.lengths import LengthCheck

DEFAULT_KINDS = {
    "movie": "Movie review:\n",
    "product": "Product review:\n",
    "editorial": "Editorial:\n",
    "tweet": "Tweet:\n",
}


class Config(StageConfig):
    """What is read, what is held out, and what a row may look like."""

    data_uri: str = Field(
        min_length=1, description="JSON lines (plain or gzipped) or Parquet: a path, file:// or s3://."
    )
    format: Literal["preferences", "ratings"] = Field(
        "preferences", description="preferences: pairs, plain or as conversations; ratings: texts that people rated."
    )
    eval_data_uri: str = Field("", description="A held-out file of the same format; empty: hold out by eval_fraction.")
    demos_uri: str = Field("", description="Demonstrations to fine-tune on; empty: prompts with chosen responses.")
    prompts_uri: str = Field("", description="Prompts for rollouts and evaluation; empty: the prompts of the pairs.")
    model_uri: str = Field("", description="The base model; its tokenizer.json says whether a row fits max_tokens.")
    max_tokens: int = Field(512, ge=8, description="The context: tokens of prompt, response and end token together.")
    eval_fraction: float = Field(0.1, ge=0, lt=1, description="Share of prompts (ratings: texts) that is held out.")
    max_bad_fraction: float = Field(0.1, ge=0, le=1, description="Fail if a larger share of the rows is in quarantine.")
    kinds: dict[str, Text] = Field(DEFAULT_KINDS, description="ratings: the prompt header of each source.")
    min_gap: float = Field(1.0, gt=0, description="ratings: least difference of mean ratings that makes a pair.")
    pairs_per_text: int = Field(2, ge=1, description="ratings: neighbours in length that each text is paired with.")
    first_words: int = Field(4, ge=1, description="ratings: prompts have up to that many first words of a text.")
    seed: int = Field(0, description="ratings: draws first words and neighbours in training; what is held out stays.")

    @model_validator(mode="after")
    def _ratings_bring_their_own(self) -> Self:
        if self.format == "ratings" and (self.demos_uri or self.prompts_uri):
            raise ValueError("demos_uri and prompts_uri go with format preferences: rated texts make their own")
        return self


class Result(BaseModel):
    """rows: read from all files, of which `kept` were used. files: records by file name."""

    rows: int
    kept: int
    quarantined: dict[str, int]
    files: dict[str, int]
    digest: str


def run(config: Config, context: StageContext, *, dataset: Path) -> Result:
    """Fills the directory `dataset`: demos, pairs and prompts of both splits, quarantine.jsonl and summary.json.

    Raises DataError if a file is no table or changed since preflight, if a file of records would be empty, or if more
    than max_bad_fraction of the rows cannot be used; quarantine.jsonl and summary.json are left there even then.
    """
    dataset.mkdir(parents=True, exist_ok=True)
    (dataset / "manifest.json").unlink(missing_ok=True)
    method = {"preferences": preferences, "ratings": ratings}[config.format]
    admission = Admission(own_eval=bool(config.eval_data_uri), eval_fraction=config.eval_fraction)
    with Quarantine(dataset / "quarantine.jsonl") as quarantine, admission, Dataset(dataset) as files:
        intake = Intake(context, quarantine)
        try:
            fits = LengthCheck.of_model(
                config.model_uri, config.max_tokens, context.log, tracking_uri=context.settings.tracking_uri
            )
            method.prepare(config, intake, files, admission, fits)
        finally:
            summary = {"format": config.format, "seed": config.seed, **intake.summary(), **files.summary()}
            (dataset / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        _judge(config, intake, files)
    digests = {name: source.digest for name, source in intake.sources.items()}
    extra = {key: summary[key] for key in ("rows", "kept", "quarantined", "files", "dropped")}
    with context.phase("manifest"):
        manifest = write_manifest(dataset, kind="dataset", config=config.model_dump(), inputs=digests, extra=extra)
    for line in _report(summary):
        context.log(line)
    return Result(**{key: summary[key] for key in ("rows", "kept", "quarantined", "files")}, digest=manifest.digest)


def _judge(config: Config, intake: Intake, files: Dataset) -> None:
    """Raises DataError if too little is left of the rows, or nothing of a kind that training or evaluation needs."""
    quarantine = intake.quarantine
    bad = intake.rows - intake.kept
    if bad > config.max_bad_fraction * intake.rows:
        what = f"{bad:,} of {intake.rows:,} rows cannot be used: {quarantine.worst()}"
        fix = f"All are in {quarantine.path}. Correct them, or raise max_bad_fraction ({config.max_bad_fraction})."
        raise DataError(what, where=config.data_uri, fix=fix)
    wants_eval = bool(config.eval_data_uri) or config.eval_fraction > 0
    empty = [name for name, count in files.counts().items() if not count and (wants_eval or ".train." in name)]
    if empty:
        bad_rows = f"; not used: {quarantine.worst()}" if bad else ""
        what = f"nothing is left for {', '.join(empty)} of {intake.rows:,} rows{bad_rows}"
        fix = f"See {quarantine.path}, and summary.json beside it."
        if not config.eval_data_uri and not any(".train." in name for name in empty):
            fix = "Raise eval_fraction, or give eval_data_uri."
        raise DataError(what, where=config.data_uri, fix=fix)


def _report(summary: dict[str, Any]) -> list[str]:
    quarantined = ", ".join(f"{count:,} {reason}" for reason, count in summary["quarantined"].items()) or "none"
    files = ", ".join(f"{name} {count:,}" for name, count in summary["files"].items())
    return [f"{summary['rows']:,} rows read, {summary['kept']:,} kept; in quarantine: {quarantined}", f"wrote {files}"]
