"""A run on disk: states are whole or not there, and nothing finished is lost."""

import json
import os
import shutil
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from tiny_training import claimed_run, tiny_recipe

from itarflow.runtime.errors import DataError, RunError
from itarflow.runtime.files import replace_folder
from itarflow.training import run_folder as runs
from itarflow.training.run_folder import RunDir, check, claim
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
        claimed_run(tmp_path / "run", tiny_recipe(), "restart").log({"step": 1})
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
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    save_state(run, 1, keep=1, write=write_step)
    resumed = claimed_run(run.path, tiny_recipe(num_workers=7, save_every=3, log_every=2), "resume")
    assert [state.name for state in resumed.states()] == ["step-00000001"]
    with pytest.raises(RunError, match=r"batch_size: 128 -> 64"):
        check(run.path, tiny_recipe(batch_size=64), "resume")


def test_metrics_are_one_json_object_a_line(tmp_path):
    run = RunDir(tmp_path)
    run.log({"step": 1, "loss": 0.5})
    run.log({"step": 2, "loss": 0.25})
    assert run.logged() == [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in run.logged()] == [1, 2]


def test_lines_of_metrics_that_are_something_else_are_left_out_and_counted(tmp_path):
    run = RunDir(tmp_path)
    good = [{"step": 1, "loss": 0.5}, {"step": 1, "held_out": {"nll": {"0.1": float("inf")}, "bpd": None}}]
    bad = ["3", "[]", "null", '{"a": 1}', '{"step": "x"}', '{"step": 1.5}', '{"step": true}', '{"step": -1}',
           '{"step": 1, "held_out": 3}', '{"step": 1, "held_out": {"nll": {"a": "b"}, "bpd": null}}',
           '{"step": 1, "psnr": [1]}', "[" * 100_000, "\x1b", "{"]  # fmt: skip
    lines = [*map(json.dumps, good), *bad]
    run.metrics.write_bytes("\n".join(lines).encode() + b'\n\xff\xfe\n{"step": 2, "cut o')
    assert run.read_log() == (good, len(bad) + 1)


def test_metrics_that_are_no_file_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(DataError, match="no regular file"):
        RunDir(tmp_path).logged()


def test_metrics_of_any_size_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_LARGEST_LOG", 100)
    run = RunDir(tmp_path)
    run.log({"step": 1})
    assert run.logged() == [{"step": 1}]
    run.metrics.write_text(run.metrics.read_text() * 20)
    with pytest.raises(DataError, match=r"metrics\.jsonl is too large; expected at most 100 bytes"):
        run.logged()


def test_neither_a_run_in_the_folder_of_the_images_nor_the_images_in_a_run(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "link").symlink_to(images)
    for place in (images, images / "run", images / "a" / "run", tmp_path / "link" / "run", tmp_path):
        with pytest.raises(RunError, match=r"the folder of the images.*--run-dir"):
            check(place, tiny_recipe(path=str(images)), "fresh")
    check(tmp_path / "run", tiny_recipe(path=str(images)), "fresh")
    check(tmp_path / "images-run", tiny_recipe(path=str(images)), "fresh")


def test_states_without_a_recipe_are_not_taken_for_a_new_run(tmp_path):
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    save_state(run, 6, keep=1, write=write_step)
    run.recipe.unlink()
    for start in ("fresh", "resume"):
        with pytest.raises(RunError, match=r"state/step-00000006 of a run, but no recipe\.json.*--restart"):
            claimed_run(run.path, tiny_recipe(), start)
    claimed_run(run.path, tiny_recipe(), "restart")
    assert run.states() == []
    assert (tmp_path / "run.1" / "state" / "step-00000006" / "weights").read_text() == "whole"


def test_a_folder_that_is_no_run_is_not_moved_away(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("a picture")
    with pytest.raises(RunError, match="holds no run"):
        claimed_run(tmp_path / "photos", tiny_recipe(), "restart")
    assert os.listdir(tmp_path / "photos") == ["a.png"]
    (tmp_path / "empty").mkdir()
    for place in ("empty", "none"):
        claimed_run(tmp_path / place, tiny_recipe(), "restart")
    assert sorted(os.listdir(tmp_path)) == ["empty", "none", "photos"]


@pytest.mark.parametrize("name", runs._WRITTEN)
@pytest.mark.parametrize("there", [True, False])
def test_links_in_a_run_lead_no_write_elsewhere(tmp_path, name, there):
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    kept = (run.path / name).exists()
    if kept:
        (run.path / name).rename(tmp_path / "elsewhere")
    elif there:
        (tmp_path / "elsewhere").write_text("precious")
    before = (tmp_path / "elsewhere").lstat() if kept or there else None
    (run.path / name).symlink_to(tmp_path / "elsewhere")
    for start in ("fresh", "resume", "restart"):
        with pytest.raises(RunError, match=rf"{name} is a link.*elsewhere.*remove it"):
            claimed_run(run.path, tiny_recipe(), start)
    assert ((tmp_path / "elsewhere").lstat() if kept or there else None) == before
    assert (tmp_path / "elsewhere").exists() == (before is not None)


def test_a_run_may_be_a_link_to_another_disk(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    claimed_run(tmp_path / "run", tiny_recipe(), "fresh").log({"step": 1})
    claimed_run(tmp_path / "run", tiny_recipe(), "resume")
    claimed_run(tmp_path / "run", tiny_recipe(), "restart")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "disk.1", "run"]
    assert (tmp_path / "disk.1" / "metrics.jsonl").exists()


@pytest.mark.parametrize("change", [lambda run: run.rename(run.with_name("moved")), shutil.rmtree])
def test_nothing_is_written_in_the_place_of_a_run_that_was_moved_or_removed(tmp_path, change):
    run = RunDir(tmp_path / "run")
    with ExitStack() as locks:
        claim(run, tiny_recipe(), "fresh", False, locks)
        run = run.held()
        run.log({"step": 1})
        change(run.path)
        for made_by_somebody_else in (False, True):
            if made_by_somebody_else:
                run.path.mkdir()
            for write in (
                lambda: run.log({"step": 2}),
                lambda: run.grid(2),
                lambda: save_state(run, 2, keep=1, write=write_step),
            ):
                with pytest.raises(RunError, match=r"run has been moved or removed.*--resume with --run-dir"):
                    write()
        assert list(run.path.iterdir()) == []


def test_what_killed_calls_left_goes_when_a_run_goes_on(tmp_path):
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    (tmp_path / "precious").write_text("precious")
    (run.path / "samples").mkdir()
    (run.path / ".partial-0123abcdpipeline").mkdir()
    (run.path / ".partial-0123abcdmetrics.jsonl").symlink_to(tmp_path / "precious")
    (run.path / "samples" / ".partial-0123abcdstep-00000001.png").write_text("half")
    claimed_run(run.path, tiny_recipe(), "resume")
    assert sorted(path.name for path in run.path.rglob("*")) == [".lock", "recipe.json", "samples", "state"]
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("content", ["[]", "3", "{", "[" * 100_000, ""])
def test_a_recipe_of_another_shape_is_a_message(tmp_path, content):
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    run.recipe.write_text(content)
    with pytest.raises(DataError, match=r"recipe\.json is damaged"):
        check(run.path, tiny_recipe(), "resume")


@pytest.mark.parametrize("start", ["fresh", "restart"])
def test_of_two_starts_at_once_one_trains_with_its_own_recipe(tmp_path, monkeypatch, start):
    both, ends = threading.Barrier(2), threading.Barrier(2)
    monkeypatch.setattr(runs, "_WAIT", 0.2)
    real = runs._make

    def make(run):
        if both.n_waiting < 2 and threading.current_thread().name not in met:
            met.add(threading.current_thread().name)
            both.wait(10)  # both have found the folder free
        real(run)

    monkeypatch.setattr(runs, "_make", make)
    met: set[str] = set()
    trained, refused = [], []

    def begin(seed):
        with ExitStack() as locks:
            try:
                claim(RunDir(tmp_path / "run"), tiny_recipe(seed=seed), start, False, locks)
                trained.append(seed)
            except RunError as error:
                refused.append(str(error))
            ends.wait(10)

    threads = [threading.Thread(target=begin, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trained) == 1
    assert "is being written by another training" in refused[0]
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["train"]["seed"] == trained[0]
    assert os.listdir(tmp_path) == ["run"]
