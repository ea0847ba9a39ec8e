"""Preference pairs to demonstrations, pairs and prompts. Streams: memory does not grow with the file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tutelage.components.core.records import Demo, Pair, Prompt, plain_text
from tutelage.components.core.tables import Reason
from tutelage.components.data_prep.checks import Admission, Rejected
from tutelage.components.data_prep.dataset import Dataset
from tutelage.components.data_prep.intake import Intake
from tutelage.components.data_prep.lengths import LengthCheck
from tutelage.components.data_prep.splits import Split, content_id, text_key

if TYPE_CHECKING:
    from tutelage.components.data_prep.stage import Config


def prepare(config: Config, intake: Intake, dataset: Dataset, admission: Admission, fits: LengthCheck | None) -> None:
    """Reads the held-out file first, if there is one: what shares a prompt with it leaks."""
    take = _Take(config, dataset, admission, fits)
    if config.eval_data_uri:
        intake.feed("eval_data", config.eval_data_uri, Pair, lambda pair: take.pair(pair, held_out=True))
    digest = intake.context.settings.data_digest
    intake.feed("data", config.data_uri, Pair, lambda pair: take.pair(pair, held_out=False), digest=digest)
    if config.demos_uri:
        intake.feed("demos", config.demos_uri, Demo, take.demo)
    if config.prompts_uri:
        intake.feed("prompts", config.prompts_uri, Prompt, take.prompt)


class _Take:
    """Takes one record at a time. Raises Rejected for one that cannot be used."""

    def __init__(self, config: Config, dataset: Dataset, admission: Admission, fits: LengthCheck | None) -> None:
        self.config, self.dataset, self.admission = config, dataset, admission
        self.fits: Callable[..., None] = fits or (lambda prompt, *responses: None)

    def pair(self, pair: Pair, *, held_out: bool) -> None:
        """Writes the pair and, where no file of their own replaces them, its demonstration and its prompt."""
        if pair.chosen == pair.rejected:
            raise Rejected(Reason.SAME_PAIR, "chosen and rejected are equal")
        self.fits(pair.prompt, pair.chosen, pair.rejected)
        key = text_key(plain_text(pair.prompt))
        split = self.admission.split(key, held_out=held_out)
        pair = self.admission.identified(pair, split, pair.prompt, pair.chosen, pair.rejected)
        self.dataset.add_pair(split, pair)
        if held_out or not self.config.demos_uri:
            self._derive_demo(split, pair)
        if held_out or not self.config.prompts_uri:
            self._derive_prompt(split, pair, key)

    def demo(self, demo: Demo) -> None:
        self.fits(demo.prompt, demo.response)
        split = self.admission.split(text_key(plain_text(demo.prompt)), held_out=False)
        self.dataset.add_demo(split, self.admission.identified(demo, split, demo.prompt, demo.response))

    def prompt(self, prompt: Prompt) -> None:
        self.fits(prompt.prompt)
        key = text_key(plain_text(prompt.prompt))
        split = self.admission.split(key, held_out=False)
        self.dataset.add_prompt(split, self.admission.identified(prompt, split, key))

    def _derive_demo(self, split: Split, pair: Pair) -> None:
        if self.admission.is_new("demo", pair.prompt, pair.chosen):
            self.dataset.add_demo(split, Demo(id=pair.id, prompt=pair.prompt, response=pair.chosen))
        else:
            self.dataset.dropped["repeated_demos"] += 1

    def _derive_prompt(self, split: Split, pair: Pair, key: int) -> None:
        if self.admission.is_new("prompt", key):
            meta = None if pair.source is None else {"source": pair.source}
            self.dataset.add_prompt(split, Prompt(id=content_id(key), prompt=pair.prompt, meta=meta))
        else:
            self.dataset.dropped["repeated_prompts"] += 1
