"""What is in a table is what runs: itarflow's own functions, and those of a plug-in's file."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from itarflow import DenoiseScheduler, Guidance, ITARFlowPipeline, denoise, plugins
from itarflow.denoisers import ode
from itarflow.flow import NoiseConfig, noise
from itarflow.inverse import guidance, guide
from itarflow.runtime.tables import Table
from itarflow.training.recipe import SamplingConfig

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "plugin_example.py"
TABLES = {
    "solver": ode.SOLVERS,
    "spacing": ode.SPACINGS,
    "distribution": noise.DISTRIBUTIONS,
    "weight": noise.WEIGHTS,
    "rule": guidance.RULES,
    "schedule": guidance.SCHEDULES,
}


@pytest.fixture(autouse=True)
def _only_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tables as without plug-ins, before each test and after it."""
    for table in TABLES.values():
        monkeypatch.setattr(table, "_entries", {name: table[name] for name in table if name in table._own})
    _forget()
    yield
    _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.startswith("itarflow_plugin:")]:
        del sys.modules[name]


def denoised(method: str, steps: int = 5, **changes: Any) -> torch.Tensor:
    schedule = DenoiseScheduler(t_max=1.0, t_min=0.01, num_denoise_steps=steps, method=method, **changes)
    return denoise(lambda x, _labels, t: x / (1 + t.view(-1, 1, 1, 1) ** 2), torch.ones(2, 1, 2, 2), None, schedule)


def zeros(*_: Any) -> torch.Tensor:
    return torch.zeros(4)


RUN: dict[str, tuple[Any, Callable[[], Any], Any]] = {
    "solver": (ode.Solver(lambda _, x: 7 * x), lambda: denoised("mine")[0, 0, 0, 0].item(), 7.0),
    "spacing": (
        lambda t_max, t_min, n: [t_max, *[0.02] * (n - 2), t_min],
        lambda: ode.noise_levels(1.0, 0.01, 4, "mine"),
        [1.0, 0.02, 0.02, 0.01, 0.0],
    ),
    "distribution": (
        zeros,
        lambda: noise.draw_noise_level(NoiseConfig(distribution="mine"), 4, torch.Generator()).tolist(),
        [0.0] * 4,
    ),
    "weight": (zeros, lambda: noise.loss_weight(NoiseConfig(weight="mine"), torch.ones(4)).tolist(), [0.0] * 4),
    "rule": (
        lambda conditional, guiding, _: (conditional[0], guiding[1]),
        lambda: [
            part.item()
            for part in guide(
                (torch.ones(1), torch.ones(1)), (torch.zeros(1), torch.zeros(1)), torch.ones(1), Guidance(rule="mine")
            )
        ],
        [1.0, 0.0],
    ),
    "schedule": (
        lambda weight, positions, _: positions + weight,
        lambda: Guidance(weight=2.0, schedule="mine").weights(torch.arange(3), 3, torch.float32).flatten().tolist(),
        [2.0, 3.0, 4.0],
    ),
}


@pytest.mark.parametrize("kind", RUN)
def test_an_entry_of_a_table_is_what_runs(kind):
    entry, call, expected = RUN[kind]
    with pytest.raises(ValueError, match="'mine'"):
        call()
    TABLES[kind].register("mine", entry)
    assert call() == expected


@pytest.mark.parametrize("kind", TABLES)
def test_every_choice_has_its_function(kind):
    table = TABLES[kind]
    assert table.default in list(table)
    assert all(table[name] is not None for name in table)


def test_options_offer_what_is_in_the_table(capsys):
    for kind in ("solver", "spacing", "rule", "schedule"):
        TABLES[kind].register("mine", RUN[kind][0])
    words = ["--method", "mine", "--spacing", "mine", "--guidance.rule", "mine", "--guidance.schedule", "mine"]
    config = tyro.cli(SamplingConfig, args=words)
    assert (config.method, config.spacing, config.guidance.rule, config.guidance.schedule) == ("mine",) * 4
    with pytest.raises(SystemExit):
        tyro.cli(SamplingConfig, args=["--help"])
    shown = capsys.readouterr().out
    assert "{euler,heun,multistep,predictor-corrector,sde,skip,mine}" in shown.replace("\n", "")
    assert "(default: euler)" in shown


def test_names_of_a_table():
    table: Table[int] = Table("number", "one", {"one": 1})
    with pytest.raises(ValueError, match=r"number is 'two'; expected one of one, or a name of a plug-in.*--plugins"):
        table["two"]
    for name in ([], None, 1.5, ("one",)):
        assert name not in table
        with pytest.raises(ValueError, match="number is"):
            table.check(name)
    with pytest.raises(ValueError, match="'one' is itarflow's own"):
        table.register("one", 3)
    for name in ("", "a b", "--x", "\x1b[0m", 3):
        with pytest.raises(ValueError, match="number of a plug-in is called"):
            table.register(name, 3)  # type: ignore[arg-type]
    table.register("a-2_b", 3)
    with pytest.warns(UserWarning, match="'a-2_b' was registered before"):
        table.register("a-2_b", 4)
    assert (table["a-2_b"], list(table)) == (4, ["one", "a-2_b"])


# A plug-in's functions are tried when they are registered


def greedy(path: ode.Path, x: torch.Tensor) -> torch.Tensor:
    for _, t, _ in path.steps():
        path.estimate(x, t)
        x = path.estimate(x, t)
    return x


WRONG: dict[str, tuple[Callable[[], None], str]] = {
    "evaluations": (lambda: plugins.register_solver("mine", greedy), "takes 2 evaluations where it may take 1"),
    "levels": (lambda: plugins.register_solver("mine", lambda path, x: path.estimate(x, 0.7)), r"level 0\.7"),
    "shape": (lambda: plugins.register_solver("mine", lambda _, x: x.mean(dim=0)), r"\(1, 2, 2\); .*\(2, 1, 2, 2\)"),
    "nothing": (lambda: plugins.register_solver("mine", lambda _p, _x: None), "gives NoneType"),  # type: ignore
    "num_levels": (
        lambda: plugins.register_solver("mine", lambda _, x: x, num_levels=lambda n: n // 2),
        "num_denoise_steps is 0",
    ),
    "one level": (
        lambda: plugins.register_noise_distribution("mine", lambda c, *_: torch.tensor(c.t_max)),
        r"gives \(\); expected a tensor of shape \(64,\)",
    ),
    "level 0": (
        lambda: plugins.register_noise_distribution("mine", lambda _, n, g: torch.zeros(n)),
        "expected finite numbers > 0",
    ),
    "weight": (lambda: plugins.register_loss_weight("mine", lambda _, t: (t - 1).log()), "'mine' gives .*nan"),
    "rule": (
        lambda: plugins.register_guidance_rule("mine", lambda c, u, w: (c[0], c[1] * math.inf)),
        "the scale of the guidance rule 'mine' gives",
    ),
    "own": (lambda: plugins.register_loss_weight("t2", lambda _, t: t), "itarflow's own"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_function_that_can_not_be_right_is_refused(case):
    register, words = WRONG[case]
    with pytest.raises(ValueError, match=words):
        register()
    assert all("mine" not in table for table in TABLES.values())


def test_a_solver_never_takes_more_evaluations_than_asked_for():
    ode.SOLVERS.register("mine", ode.Solver(greedy))  # past the trial
    with pytest.raises(ValueError, match="'mine' takes more evaluations than num_denoise_steps"):
        denoised("mine")


# The file


def test_the_example_is_of_second_order():
    plugins.load(EXAMPLE)
    low = 1 + 0.01**2  # the variance at t_min of data with a standard deviation of 1
    exact = math.sqrt(low / 2) / low  # from x = 1 at t = 1 down the ODE, and from there by one step
    errors = [denoised("midpoint", steps)[0, 0, 0, 0].item() - exact for steps in (11, 21)]
    euler = denoised("euler", 21)[0, 0, 0, 0].item() - exact
    assert abs(errors[1]) < abs(errors[0]) / 3
    assert abs(errors[1]) < abs(euler) / 5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("import itarflow\n\nraise KeyError('x\x1b')", r"fails in line 3: KeyError: 'x\\x1b'"),
        ("def f(:\n    pass", "fails in line 1: SyntaxError"),
        ("import nothing_of_the_kind", "fails in line 1: ModuleNotFoundError"),
    ],
)
def test_a_file_that_fails_says_where(tmp_path, content, words):
    (tmp_path / "my.py").write_text(content)
    with pytest.raises(ValueError, match=words):
        plugins.load(tmp_path / "my.py")


def test_a_file_is_run_once(tmp_path, capsys):
    (tmp_path / "my.py").write_text("print('ran')")
    for _ in range(2):
        plugins.load(tmp_path / "my.py")
    assert capsys.readouterr().out == "ran\n"


def test_words_of_the_command_line():
    words = ["--plugins", str(EXAMPLE), "pets", "--seed", "1", f"--plugins={EXAMPLE}"]
    assert plugins.load_named(words) == ["pets", "--seed", "1"]
    assert "midpoint" in ode.SOLVERS
    for wrong in (["--plugins"], ["--plugins", "--seed"], ["--plugins="]):
        with pytest.raises(ValueError, match="--plugins is given without a file"):
            plugins.load_named(wrong)


def test_commands_say_what_is_wrong_with_a_file(refused):
    assert "no_such.py: there is no such file" in refused("info", "somewhere", "--plugins", "no_such.py")


def test_commands_know_the_names_of_a_file(run, save):
    folder = save()
    run("sample", folder, "--output", "mine.png", "--method", "midpoint", "--plugins", EXAMPLE)
    assert Path("mine.png").exists()


# A checkpoint with names that are not known here


def stored(folder: Path, **names: str) -> None:
    for file, values in (
        ("scheduler/scheduler_config.json", {"method": names["method"], "spacing": names["spacing"]}),
        ("model_index.json", {"guidance": {"weight": 1.5, "rule": names["rule"]}}),
    ):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_checkpoint_with_unknown_names_opens_with_a_warning(save):
    folder = save()
    stored(folder, method="mine", spacing="their\x1b[31m", rule="shift_only")
    with pytest.warns(UserWarning, match="takes its place") as said:
        pipe = ITARFlowPipeline.from_pretrained(folder)
    messages = [str(one.message) for one in said]
    for words in ("method is 'mine'", r"spacing is 'their\x1b[31m'", "rule is 'shift_only'"):
        assert any(words in one and "takes its place" in one and "--plugins" in one for one in messages), words
    assert (pipe.scheduler.config.method, pipe.scheduler.config.spacing) == ("euler", "even")
    assert pipe.default_guidance == Guidance(weight=1.5)
    assert json.loads((folder / "model_index.json").read_text())["guidance"]["rule"] == "shift_only"
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(class_labels=[0]).images) == 1


def test_known_names_are_kept_without_a_word(save):
    plugins.load(EXAMPLE)
    folder = save()
    stored(folder, method="midpoint", spacing="quadratic", rule="shift_only")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe = ITARFlowPipeline.from_pretrained(folder)
    assert (pipe.scheduler.config.method, pipe.default_guidance.rule) == ("midpoint", "shift_only")


def test_a_name_that_is_asked_for_is_refused_and_not_replaced(save):
    pipe = ITARFlowPipeline.from_pretrained(save())
    with pytest.raises(ValueError, match="method is 'midpoint'"):
        pipe(class_labels=[0], method="midpoint")


@pytest.mark.slow
def test_training_sampling_and_sharing_with_a_plug_in(tmp_path):
    def call(*words: object) -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "itarflow", *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    with_plugin = ("--plugins", EXAMPLE)
    tiny = "--model.channels 16 --model.head-dim 8 --model.num-layers 1 1 --model.patch-size 4 --train.batch-size 8"
    mine = "--noise.distribution log_uniform --noise.weight sqrt --sampling.method midpoint"
    rule = "--sampling.guidance.rule shift_only --sampling.num-images 4 --sampling.num-denoise-steps 4"
    call("train", ROOT / "recipes/digits.py", "--max-steps", 2, *f"{tiny} {mine} {rule}".split(), *with_plugin)
    folder = tmp_path / "runs/digits/pipeline"
    recipe = json.loads((tmp_path / "runs/digits/recipe.json").read_text())
    assert (recipe["noise"]["distribution"], recipe["noise"]["weight"]) == ("log_uniform", "sqrt")
    assert "takes its place" not in call("sample", folder, "--num-images", 1, "--output", "mine.png", *with_plugin)
    said = call("sample", folder, "--num-images", 1, "--output", "without.png")
    assert "method is 'midpoint'" in said
    assert "rule is 'shift_only'" in said
    assert (tmp_path / "mine.png").read_bytes() != (tmp_path / "without.png").read_bytes()
