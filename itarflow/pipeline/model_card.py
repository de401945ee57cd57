"""The model card that is written beside a shared checkpoint."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from itarflow.runtime.text import flat, printable

PICTURE = "samples.png"
"""The picture of a card, in the pipeline's folder."""
_TASK = "unconditional-image-generation"
_ESSENTIALS = (
    "data.path",
    "data.split",
    "noise.distribution",
    "noise.t_min",
    "noise.t_max",
    "train.epochs",
    "train.batch_size",
    "train.learning_rate",
    "train.ema_decay",
    "train.label_drop",
)
"""What a card tells of a recipe, all of which is in model_index.json."""
_TEMPLATE = """---
{metadata}
---

# {title}

A normalizing flow that generates images: {kind}, {made} `itarflow`.{picture}

```bash
pip install {install}
```

```python
from itarflow import ITARFlowPipeline

pipe = ITARFlowPipeline.from_pretrained("{place}")
{example}.images[0]
```{missing}

## What it is

{architecture}

## How it samples

{sampling}

## How it was trained

{training}

## Results

{results}

{license}## References

- S. Zhai et al., [Normalizing Flows are Capable Generative Models](https://arxiv.org/abs/2412.06329), ICML 2025.
- T. Chen et al., [Normalizing Flows with Iterative Denoising](https://arxiv.org/abs/2604.20041), 2026.
{starflow}"""
_STARFLOW = """- J. Gu et al., [STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis]\
(https://arxiv.org/abs/2506.06276), 2025.
"""


def model_card(
    *,
    architecture: Mapping[str, Any],
    sampling: Mapping[str, Any],
    training: Mapping[str, Any] | None,
    class_names: list[str] | None,
    evaluations: Mapping[str, str],
    repo_id: str | None = None,
    license: str | None = None,  # noqa: A002
    picture: bool = False,
    missing: Collection[str] = (),
) -> ModelCard:
    """A card with metadata for the Hub and tables for readers.

    Args:
        architecture: the flow's config and number of parameters.
        sampling: defaults of the pipeline.
        training: from `training.export.training_record`: "name", "data", "recipe" and "metrics"; None = unknown.
        class_names: names of the labels; None = unlabelled.
        evaluations: figures of samples, by what was evaluated.
        repo_id: where it is shared; None = not yet.
        license: of the weights, an identifier of the Hub; None = that of the training record, if it has one.
        picture: whether there is a picture beside the card.
        missing: parts that images need, but that are not in it: "vae", "text_encoder".

    Raises:
        ValueError: another license than the one that converted weights keep.
    """
    # What was stored comes back in another order, and a card that is generated anew must be the same.
    architecture, sampling, training = (_in_order(values) for values in (architecture, sampling, training or {}))
    name, metrics = _line(training.get("name", "itarflow")), training.get("metrics", {})
    iterative = architecture.get("noise_conditioned", True)
    family = family_of(architecture)
    prompted = "prompts" in architecture
    task = "text-to-image" if prompted else _TASK
    data = training.get("data") if _is_hub_name(training.get("data")) else None
    figures = {what: _figures(text) for what, text in sorted(evaluations.items())}
    metadata = ModelCardData(
        library_name="itarflow",
        license=_license_name(license, training),
        pipeline_tag=task,
        tags=["itarflow", "normalizing-flow", family, "image-generation"],
        datasets=[data] if data else None,
        model_name=repo_id or name,
        eval_results=_eval_results(task, training.get("data"), metrics, figures) or None,
    )
    return ModelCard(
        _TEMPLATE.format(
            metadata=metadata.to_yaml(),
            title=name,
            place=repo_id or "path/to/this/folder",
            install='"itarflow[text]"' if prompted else "itarflow",
            kind=f"{family} ({'conditioned on the noise level' if iterative else 'one noise level'})",
            made="converted by" if training.get("converted") else "trained with",
            license=_license_section(training),
            picture=f"\n\n![Samples]({PICTURE})" if picture else "",
            example=_example(_subject(class_names, architecture.get("num_classes", 0), training, prompted), missing),
            missing="".join(f"\n\n{text}" for part, text in _MISSING.items() if part in missing),
            starflow=_STARFLOW if family == "STARFlow" else "",
            architecture=_table(architecture),
            sampling=_table(sampling),
            training=_conversion(training) + _training_table(training),
            results="\n\n".join(_results(metrics, figures, evaluations)) or "Not recorded.",
        )
    )


def family_of(config: Mapping[str, Any]) -> str:
    """The paper whose model a flow of that config is; STARFlow's blocks may be conditioned on the noise level, too."""
    iterative = config.get("noise_conditioned", True)
    return "STARFlow" if config.get("start_token") else "iTARFlow" if iterative else "TARFlow"


_SIGNATURE = "<!-- Written by itarflow, which keeps it up to date until somebody edits it: {} -->"


def signed(card: str) -> str:
    """A card that says of itself, in a comment at its end, that it was generated."""
    return f"{card.rstrip()}\n\n{_SIGNATURE.format(_digest(card))}\n"


def is_generated(card: str) -> bool:
    """Whether a card is one of `signed` as it was written, or of version 0.1: nobody has edited it since."""
    text, _, signature = card.rstrip().rpartition("\n")
    return signature == _SIGNATURE.format(_digest(text)) or _OF_0_1.fullmatch(card.strip()) is not None


_TABLE_OF_0_1 = r"(?:Not recorded\.|\| setting \| value \|\n\| --- \| --- \|(?:\n\|.*\|)+)"
_OF_0_1 = re.compile(rf"""---
(?:(?:library_name|pipeline_tag|tags|datasets|metrics):.*\n|- .*\n)+---

# .+

A normalizing flow that generates images: (?:iTARFlow|TARFlow) \(.*\), trained with `itarflow`\.

```python
from itarflow import ITARFlowPipeline

pipe = ITARFlowPipeline\.from_pretrained\(".*"\)  # this repository's id, or a local folder
image = pipe\(.*\)\.images\[0\]
```

## What it is

{_TABLE_OF_0_1}

## How it samples

{_TABLE_OF_0_1}

## How it was trained

{_TABLE_OF_0_1}

## Results

{_TABLE_OF_0_1}

{re.escape(_TEMPLATE[_TEMPLATE.index("## References") :].format(starflow="").strip())}""")
"""The cards of version 0.1, which had no signature: with anything but its own sentences and tables it is no match."""


def _digest(card: str) -> str:
    return hashlib.sha256(card.strip().encode()).hexdigest()[:16]


def _is_hub_name(data: str | None) -> bool:
    """Whether training data are a data set on the Hub, which refuses a card that names others."""
    return data is not None and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", data) is not None and not Path(data).exists()


_MISSING = {
    "vae": "It holds no VAE, so that codes come out. For images give `from_pretrained` the VAE of its training, "
    "`vae=AutoencoderKL.from_pretrained(...)`, and leave `output_type` out.",
    "text_encoder": "It holds no text encoder. Load that of its training, `text = TextEncoder.from_pretrained(...)` "
    "of `itarflow.text_encoder`, and give `from_pretrained` `text_encoder=text.encoder, tokenizer=text.tokenizer`; or "
    "give `prompt_embeds` in the place of `prompt`.",
}
"""What a card says of a part that is not in it, and that its example needs."""


def _subject(class_names: list[str] | None, num_classes: int, training: Mapping[str, Any], prompted: bool) -> str:
    """What the example's call asks for: a caption of the training, if one is recorded, or a class."""
    if prompted:
        found = training.get("example_prompt")
        return f"prompt={_line(found) if isinstance(found, str) else 'a corgi on the beach'!r}"
    if num_classes:
        return f"class_labels=[{_line(class_names[0])!r}]" if class_names else "class_labels=[0]"
    return "num_images=1"


def _example(subject: str, missing: Collection[str]) -> str:
    return f"codes = pipe({subject}, output_type='codes')" if "vae" in missing else f"image = pipe({subject})"


def _training_table(training: Mapping[str, Any]) -> str:
    known = ("name", "data", "metrics", "recipe", "example_prompt")
    facts = {
        key: value for key, value in training.items() if key not in known and isinstance(value, str | int | float)
    }
    settings = flat(training.get("recipe", {}))
    essentials = {key: settings[key] for key in _ESSENTIALS if key in settings}
    if not (facts or essentials):
        return "Not recorded."
    more = "\n\n`itarflow info` shows all settings of the training." if settings.keys() - essentials.keys() else ""
    return _table({**facts, **essentials}) + more


def _conversion(training: Mapping[str, Any]) -> str:
    """Where converted weights are from, and what was changed; "" if they were trained here."""
    converted = _facts(training, "converted")
    if not converted:
        return ""
    where = f" from {converted['source']}" if "source" in converted else ""
    return f"By others, not here: the weights were converted{where}. {converted.get('changes', '')}\n\n"


def _license_name(asked: str | None, training: Mapping[str, Any]) -> str | None:
    """The license for the metadata: what is asked for, or that of converted weights."""
    known = _facts(training, "license")
    name = known.get("name")
    if known.get("kept") and asked not in (None, name):
        raise ValueError(
            f"license is {asked!r}, but these weights were converted from some under {name}, which their derivatives "
            "keep; leave the license out."
        )
    return asked or name


def _license_section(training: Mapping[str, Any]) -> str:
    """What has to be said where converted weights are passed on; "" for others."""
    known = _facts(training, "license")
    if "notice" not in known:
        return ""
    agreement = f"\n\nWhoever passes them on adds a copy of the agreement: {known['text']}" if "text" in known else ""
    return f"## License of the weights\n\n{known['notice']}{agreement}\n\n"


def _facts(training: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A part of a training record, which may be anybody's: its texts, each as part of a line, and its switches."""
    facts = training.get(key)
    known = facts.items() if isinstance(facts, Mapping) else ()
    return {
        str(name): _line(value) if isinstance(value, str) else value
        for name, value in known
        if isinstance(value, str | bool)
    }


def _results(
    metrics: Mapping[str, Any], figures: Mapping[str, Mapping[str, str]], evaluations: Mapping[str, str]
) -> list[str]:
    """Tables of the training's own metrics, and of the evaluations of samples, a row each."""
    tables = [_table(metrics, ("metric", "value"))] if metrics else []
    titles = list(dict.fromkeys(title for row in figures.values() for title in row))
    if titles and all(figures.values()):
        rows = [[what, *(row.get(title, "") for title in titles)] for what, row in figures.items()]
        tables.append(_rows(["samples", *titles], rows))
    elif evaluations:
        tables.append(_table(dict(sorted(evaluations.items())), ("samples", "figures")))
    return tables


def _figures(text: str) -> dict[str, str]:
    """Title and value of each figure in a line such as "FID 2.5, precision 0.7 ± 0.01"; {} if it is none."""
    found = [re.fullmatch(r"(.*?\S) (-?[\d.]+(?:e[-+]?\d+)?(?: ± [\d.e+-]+)?)", part) for part in text.split(", ")]
    return {one[1]: one[2] for one in found if one} if all(found) else {}


def _eval_results(
    task: str, data: str | None, metrics: Mapping[str, Any], figures: Mapping[str, Mapping[str, str]]
) -> list[EvalResult]:
    """Figures as the Hub's model index has them: the type is the name in lower case."""
    named = [(name, name, value) for name, value in metrics.items() if isinstance(value, int | float)]
    for what, row in figures.items():
        named += [(title, f"{title}, {what}", float(value.split()[0])) for title, value in row.items()]
    return [
        EvalResult(
            task_type=task,
            dataset_type=data if data and _is_hub_name(data) else "custom",
            dataset_name=_line(data or "not recorded"),
            metric_type=re.sub(r"\W+", "-", title.split(" at ")[0].lower()).strip("-"),
            metric_name=_line(name),
            metric_value=value,
        )
        for title, name, value in named
        if math.isfinite(value)
    ]


def _table(values: Mapping[str, Any], heads: Sequence[str] = ("setting", "value")) -> str:
    return _rows(heads, [[key, value] for key, value in values.items() if not str(key).startswith("_")])


def _rows(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if isinstance(value, list | tuple):
        text = ", ".join(map(str, value))
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    """Text of anybody's as part of a line of a card, which it can't leave."""
    return printable(str(text)).replace("\n", " ").replace("`", "'")


def _in_order(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values, by name."""
    return {key: _in_order(value) if isinstance(value, Mapping) else value for key, value in sorted(values.items())}
