"""What users of a checkpoint meet: the diffusers pipeline, its folder, its model card and its plan."""

from itarflow.pipeline.pipeline import ITARFlowPipeline

__all__ = ["ITARFlowPipeline"]
