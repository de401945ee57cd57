"""`itarflow info`: what a checkpoint is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from itarflow.commands.console import print_table
from itarflow.pipeline.model_card import family_of
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.runtime.hub import folder_of
from itarflow.runtime.json_file import read_json
from itarflow.runtime.model_folder import CONFIG
from itarflow.runtime.pipeline_index import ENCODER
from itarflow.runtime.text import printable


@dataclass(frozen=True)
class Info:
    """Show what a checkpoint is: architecture, noise levels, sampling defaults, and how it was trained."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """A folder with a pipeline, or a Hugging Face Hub id (NAME/MODEL)."""

    def run(self) -> None:
        """Carry the command out."""
        # Without its text encoder, which is large, and needs transformers.
        pipe = ITARFlowPipeline.from_pretrained(self.checkpoint, text_encoder=None, tokenizer=None)
        config, parameters = pipe.flow.config, sum(p.numel() for p in pipe.flow.parameters())
        levels = "conditioned on the noise level" if config.noise_conditioned else "one noise level"
        num_tokens, token_dim = pipe.flow.z_shape
        _table("Flow", {
            "kind": f"{family_of(config)}, {levels}",
            "parameters": f"{parameters:,}",
            "trained on noise levels": _range(config.noise_range),
            "z": f"{num_tokens} tokens of {token_dim} values",
            **_public(config, without=("noise_conditioned", "noise_range")),
        })  # fmt: skip
        _table("Codes", pipe.vae_facts())
        _table("Prompts", _prompts(self.checkpoint, pipe))
        _table("Sampling defaults", {
            **_public(pipe.scheduler.config),
            **{f"guidance {key}": value for key, value in vars(pipe.default_guidance).items()},
            **{key: value for plan in pipe.inverse_plans for key, value in plan.described().items()},
        })  # fmt: skip
        names = pipe.config.class_names
        if names and names != [str(index) for index in range(len(names))]:
            more = {"...": f"{len(names)} in all"} if len(names) > 20 else {}
            _table("Labels", {str(index): name for index, name in enumerate(names[:20])} | more)
        _table("Evaluations", pipe.config.evaluations or {})
        training = pipe.config.training
        if training:
            recipe = training.get("recipe", {})
            facts = {key: value for key, value in training.items() if key not in ("recipe", "metrics")}
            _table("Training", facts if facts.keys() != {"name"} else {})
            _table("Results", training.get("metrics", {}))
            _table("Recipe", {section: values for section, values in recipe.items() if isinstance(values, dict)})


def _prompts(checkpoint: str, pipe: ITARFlowPipeline) -> dict[str, Any]:
    """As `ITARFlowPipeline.prompt_facts`, but the text encoder's by its config alone."""
    file = f"{ENCODER}/{CONFIG}"
    path = folder_of(checkpoint, [file], expected="a pipeline") / file
    if not pipe.takes_prompts or not path.is_file():
        return pipe.prompt_facts()
    config = read_json(path, dict[str, Any])
    size = f"{pipe.flow.config.context_tokens} vectors of {pipe.flow.config.context_dim}"
    return {"prompts": f"read by a T5EncoderModel of {config.get('num_layers')} layers, as {size}"}


def _shown(value: Any) -> Any:
    """The same value with all text in it printable: names may be anybody's."""
    if isinstance(value, dict):
        return {printable(str(key)): _shown(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(entry) for entry in value]
    return printable(value) if isinstance(value, str) else value


def _table(title: str, values: dict[str, Any]) -> None:
    print_table(title, _shown(values))


def _public(config: Any, without: Sequence[str] = ()) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in without}


def _range(noise_range: Sequence[float] | None) -> str:
    return "not recorded" if noise_range is None else f"{noise_range[0]:g} to {noise_range[1]:g}"
