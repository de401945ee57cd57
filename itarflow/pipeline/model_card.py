"""The model card that is written beside a shared checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from itarflow.runtime.text import flat

_TEMPLATE = """---
{metadata}
---

# {name}

A normalizing flow that generates images: {kind}, trained with `itarflow`.

```python
from itarflow import ITARFlowPipeline

pipe = ITARFlowPipeline.from_pretrained("{name}")  # this repository's id, or a local folder
image = pipe({example}).images[0]
```

## What it is

{architecture}

## How it samples

{sampling}

## How it was trained

{training}

## Results

{results}

## References

- S. Zhai et al., [Normalizing Flows are Capable Generative Models](https://arxiv.org/abs/2412.06329), ICML 2025.
- T. Chen et al., [Normalizing Flows with Iterative Denoising](https://arxiv.org/abs/2604.20041), 2026.
"""


def model_card(
    *,
    architecture: Mapping[str, Any],
    sampling: Mapping[str, Any],
    training: Mapping[str, Any] | None,
    class_names: list[str] | None,
    evaluations: Mapping[str, str],
) -> ModelCard:
    """A card with metadata for the Hub and tables for readers.

    Args:
        architecture: the flow's config and number of parameters.
        sampling: defaults of the pipeline.
        training: from `training.export.training_record`: "name", "data", "recipe" and "metrics"; None = unknown.
        class_names: names of the labels; None = unlabelled.
        evaluations: figures of samples, by what was evaluated.
    """
    # What was stored comes back in another order, and a card that is generated anew must be the same.
    architecture, sampling, training = (_in_order(values) for values in (architecture, sampling, training or {}))
    name, metrics = training.get("name", "itarflow"), training.get("metrics", {})
    iterative = architecture.get("noise_conditioned", True)
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["itarflow", "normalizing-flow", "iTARFlow" if iterative else "TARFlow", "image-generation"],
        datasets=[training["data"]] if _is_hub_name(training.get("data")) else None,
        metrics=sorted(metrics) or None,
    )
    recipe = training.get("recipe", {})
    return ModelCard(
        _TEMPLATE.format(
            metadata=metadata.to_yaml(),
            name=name,
            kind="iTARFlow (conditioned on the noise level)" if iterative else "TARFlow (one noise level)",
            example=_example(class_names, architecture.get("num_classes", 0)),
            architecture=_table(architecture),
            sampling=_table(sampling),
            training=_table(flat(recipe)) if recipe else "Not recorded.",
            results=_table({**metrics, **evaluations}) if metrics or evaluations else "Not recorded.",
        )
    )


def _is_hub_name(data: str | None) -> bool:
    """Whether training data are a data set on the Hub, which refuses a card that names others."""
    return data is not None and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", data) is not None and not Path(data).exists()


def _example(class_names: list[str] | None, num_classes: int) -> str:
    if num_classes == 0:
        return "num_images=1"
    return f"class_labels=[{class_names[0]!r}]" if class_names else "class_labels=[0]"


def _table(values: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {_cell(value)} |" for key, value in values.items() if not str(key).startswith("_")]
    return "\n".join(["| setting | value |", "| --- | --- |", *rows])


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if isinstance(value, list | tuple):
        text = ", ".join(map(str, value))
    return text.replace("|", "\\|").replace("\n", " ")


def _in_order(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values, by name."""
    return {key: _in_order(value) if isinstance(value, Mapping) else value for key, value in sorted(values.items())}
