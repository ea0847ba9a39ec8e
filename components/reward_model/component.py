# ruff: noqa: B006 (KFP reads a component's defaults and never changes them)
from kfp import dsl

from tutelage.components.core.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def reward_model(
    dataset: dsl.Input[dsl.Dataset],
    policy: dsl.Input[dsl.Model],
    reward_model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    objective: str = "bradley_terry",
    learning_rate: float = 1e-5,
    seed: int = 0,
    overrides: dict = {},
    settings: dict = {},
) -> None:
    """Reward modelling: learns from the preference pairs how much people like a response.

    Args:
        dataset: Prepared records; the preference pairs in it are trained on.
        policy: The model whose weights the reward model starts from.
        reward_model: A sequence classifier with one output and its tokenizer, as safetensors.
        metrics: Final losses and the accuracy on pairs held out.
        objective: Name of the reward-model objective.
        learning_rate: Peak learning rate.
        seed: Seed of the new head, shuffling and dropout.
        overrides: Any other key of the stage's configuration, such as {"training": {"epochs": 2}}.
        settings: What preflight resolved for the whole run.
    """
    from tutelage.components.core.figures import write_figures
    from tutelage.components.core.launch import launch
    from tutelage.components.core.parameters import configure
    from tutelage.components.reward_model.stage import Config

    config = configure(Config, overrides, objective=objective, learning_rate=learning_rate, seed=seed)
    result = launch(
        "reward_model",
        config,
        settings,
        inputs={"dataset": dataset.path, "policy": policy.path},
        outputs={"reward_model": reward_model.path},
    )
    metrics.metadata.update(write_figures(result, metrics.path))
