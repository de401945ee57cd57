"""A run on disk: states are whole or not there, and nothing finished is lost."""

import json
from pathlib import Path

import pytest
from tiny_training import tiny_recipe

from itarflow.runtime.errors import RunError
from itarflow.runtime.files import replace_folder
from itarflow.training.run_folder import RunDir, check, prepare
from itarflow.training.states import save_state


def write_step(folder):
    (folder / "weights").write_text("whole")


def test_a_failed_export_leaves_the_older_pipeline(tmp_path):
    def fails(folder):
        folder.mkdir()
        raise OSError("disk full")

    target = tmp_path / "pipeline"
    replace_folder(target, lambda folder: (folder.mkdir(), write_step(folder)))
    with pytest.raises(RunError, match=r"pipeline.*disk full"):
        replace_folder(target, fails)
    assert (target / "weights").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_a_pipeline_lost_between_two_renames_is_brought_back_before_anything_else(tmp_path):
    def fails(folder):
        raise OSError("disk full")

    (tmp_path / ".old-pipeline").mkdir()
    write_step(tmp_path / ".old-pipeline")
    with pytest.raises(RunError):
        replace_folder(tmp_path / "pipeline", fails)
    assert (tmp_path / "pipeline" / "weights").read_text() == "whole"


def test_an_export_replaces_the_older_pipeline(tmp_path):
    target = tmp_path / "pipeline"
    for text in ("old", "new"):
        replace_folder(target, lambda folder, text=text: (folder.mkdir(), (folder / text).write_text(text)))
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_restart_keeps_the_old_run_beside_the_new_one(tmp_path):
    for _ in range(3):
        prepare(tmp_path / "run", tiny_recipe(), "restart").log({"step": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    assert (tmp_path / "run.1" / "metrics.jsonl").exists()


def test_a_folder_without_a_run_can_not_be_resumed(tmp_path):
    with pytest.raises(RunError, match="holds no run to resume"):
        check(tmp_path / "run", tiny_recipe(), "resume")


def test_checking_touches_nothing(tmp_path):
    check(tmp_path / "run", tiny_recipe(), "fresh")
    check(tmp_path / "run", tiny_recipe(), "restart")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_written_is_found_out_by_trying():
    with pytest.raises(RunError, match=r"/proc/run can't be written.*--run-dir"):
        check(Path("/proc/run"), tiny_recipe(), "fresh")


def test_settings_that_do_not_matter_may_change_on_resuming(tmp_path):
    run = prepare(tmp_path / "run", tiny_recipe(), "fresh")
    save_state(run, 1, keep=1, write=write_step)
    resumed = prepare(run.path, tiny_recipe(num_workers=7, save_every=3, log_every=2), "resume")
    assert [state.name for state in resumed.states()] == ["step-00000001"]
    with pytest.raises(RunError, match=r"batch_size: 128 -> 64"):
        check(run.path, tiny_recipe(batch_size=64), "resume")


def test_metrics_are_one_json_object_a_line(tmp_path):
    run = RunDir(tmp_path)
    run.log({"step": 1, "loss": 0.5})
    run.log({"step": 2, "loss": 0.25})
    assert run.logged() == [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in run.logged()] == [1, 2]


def test_the_folder_of_the_images_is_no_place_for_a_run(tmp_path):
    with pytest.raises(RunError, match=r"is the folder of the images.*--run-dir"):
        check(tmp_path, tiny_recipe(path=str(tmp_path)), "fresh")
