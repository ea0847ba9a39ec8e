from kfp import dsl

from tutelage.components.core.images import LIGHT_IMAGE


@dsl.component(base_image=LIGHT_IMAGE, install_kfp_package=False)
def finalize(
    status: dsl.PipelineTaskFinalStatus,
    pipeline: str,
    register_name: str = "tutelage",
    run_store_uri: str = "",
    run_tracking_uri: str = "",
) -> None:
    """Finalize: however the run ended, says how, closes its MLflow run, tidies up after a success, and notifies.

    Args:
        status: How the stages ended; filled in by the pipeline's exit handler.
        pipeline: Name of the pipeline.
        register_name: Name of the registered model, and of the MLflow experiment.
        run_store_uri: Where checkpoints, records and models are kept.
        run_tracking_uri: The MLflow server.
    """
    from tutelage.components.finalize.stage import Config, run

    run(
        Config(
            pipeline=pipeline,
            register_name=register_name,
            run_store_uri=run_store_uri,
            run_tracking_uri=run_tracking_uri,
            state=status.state or "",
            message=status.error_message or "",
        )
    )
