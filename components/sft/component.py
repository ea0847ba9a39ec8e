# ruff: noqa: B006 (KFP reads a component's defaults and never changes them)
from kfp import dsl

from tutelage.components.core.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def sft(
    dataset: dsl.Input[dsl.Dataset],
    policy: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    model_uri: str,
    epochs: float = 1.0,
    learning_rate: float = 5e-5,
    seed: int = 0,
    overrides: dict = {},
    settings: dict = {},
) -> None:
    """Supervised fine-tuning: trains the base model on the responses that people preferred.

    Args:
        dataset: Prepared records; the demonstrations in it are trained on.
        policy: The tuned model with its tokenizer, as safetensors.
        metrics: Final losses.
        model_uri: The base model: a directory, an s3:// prefix or a hub id.
        epochs: Passes over the demonstrations.
        learning_rate: Peak learning rate.
        seed: Seed of shuffling and dropout.
        overrides: Any other key of the stage's configuration, such as {"training": {"batch_size": 32}}.
        settings: What preflight resolved for the whole run.
    """
    from tutelage.components.core.figures import write_figures
    from tutelage.components.core.launch import launch
    from tutelage.components.core.parameters import configure
    from tutelage.components.sft.stage import Config

    config = configure(Config, overrides, model_uri=model_uri, epochs=epochs, learning_rate=learning_rate, seed=seed)
    result = launch("sft", config, settings, inputs={"dataset": dataset.path}, outputs={"policy": policy.path})
    metrics.metadata.update(write_figures(result, metrics.path))
