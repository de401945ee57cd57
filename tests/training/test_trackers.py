"""What a training says: unreadable images once each, gradients with their noise level, figures in bits."""

import pytest
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import claimed_run, tiny_recipe

from itarflow.runtime.errors import DataError
from itarflow.training.metrics import Monitor
from itarflow.training.sharding import make_accelerator


@pytest.fixture
def monitor(tmp_path):
    run = claimed_run(tmp_path / "run", tiny_recipe(max_broken=2), "fresh")
    return Monitor(tiny_recipe(max_broken=2), run, Accelerator(cpu=True))


def test_each_unreadable_image_is_named_once_and_too_many_end_the_run(monitor, capsys):
    monitor.name_broken(["a.png: cut short", "a.png: cut short"])
    monitor.name_broken(["a.png: cut short", "[b].png: empty"])
    printed = capsys.readouterr().err
    assert (printed.count("a.png"), printed.count("[b].png")) == (1, 1)
    with pytest.raises(DataError, match=r"3 images .*data.max_broken is 2"):
        monitor.name_broken(["c.png: empty"])


def test_what_an_earlier_part_of_the_run_met_is_not_repeated_and_does_not_count(monitor, capsys):
    monitor.broken = frozenset({"a.png: cut short", "b.png: empty"})
    monitor.name_broken(["a.png: cut short", "c.png: empty"])
    printed = capsys.readouterr().err
    assert ("a.png" in printed, "c.png" in printed) == (False, True)
    assert len(monitor.broken) == 3


def test_what_another_process_says_is_only_counted(monitor, capsys):
    monitor.name_broken(["a.png: cut short"], aloud=False)
    assert capsys.readouterr().err == ""
    assert monitor.broken == {"a.png: cut short"}


def test_a_sample_grid_reaches_tensorboard(tmp_path):
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    monitor = Monitor(tiny_recipe(), run, make_accelerator(run.path, accumulation=1, trackers=("tensorboard",)))
    Image.new("L", (30, 20), 200).save(tmp_path / "grid.png")
    monitor.log_picture(7, tmp_path / "grid.png")
    monitor.accelerator.trackers[0].finish()
    (events,) = (run.path / "logs").glob("events*")
    found = EventAccumulator(str(events)).Reload()
    (picture,) = found.Images("samples")
    assert (picture.step, picture.width, picture.height) == (7, 30, 20)


def test_the_recipes_accumulation_is_used_whatever_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert make_accelerator(tmp_path, accumulation=1, trackers=()).gradient_accumulation_steps == 1
    assert make_accelerator(tmp_path, accumulation=2, trackers=()).gradient_accumulation_steps == 2


def test_an_explosion_is_far_above_the_usual_norm(monitor):
    assert not any(monitor.exploded(1.0 + 0.1 * (step % 3)) for step in range(30))
    assert monitor.exploded(20.0)
    assert not monitor.exploded(1.0)  # the usual norm has hardly moved


def test_at_first_no_norm_is_unusual(monitor):
    assert not any(monitor.exploded(norm) for norm in (1.0, 100.0, 10000.0))


def test_explosions_are_reported_with_their_noise_level_but_not_each(monitor, capsys):
    for step in (100, 101, 250):
        monitor.report_explosion(step, 85.0, 0.31, 5.2)
    printed = capsys.readouterr().out
    assert "Step 100: gradient norm 85" in printed
    assert "noise level 0.31 (nll 5.2 nats/dim)" in printed
    assert "Step 101" not in printed
    assert "Step 250" in printed
