from itarflow.pipeline import ITARFlowPipeline  # noqa: F401
