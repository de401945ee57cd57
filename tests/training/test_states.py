"""Saved states are whole or not there, and a damaged one is told from a whole one."""

import json
import os

import pytest
from tiny_training import tiny_recipe

from itarflow.runtime.errors import RunError
from itarflow.training.run_folder import prepare
from itarflow.training.states import MANIFEST, fault, newest_whole, save_state, set_aside_newer


def write_step(folder):
    (folder / "weights").write_text("whole")


def test_only_the_newest_states_are_kept(tmp_path):
    run = prepare(tmp_path / "run", tiny_recipe(), "fresh")
    for step in (10, 200, 3000):
        save_state(run, step, keep=2, write=write_step)
    assert [state.name for state in run.states()] == ["step-00000200", "step-00003000"]


def test_a_disk_that_fills_up_leaves_the_older_state_whole(tmp_path):
    def fails_half_way(folder):
        (folder / "weights").write_text("ha")
        raise OSError(28, "No space left on device")

    run = prepare(tmp_path / "run", tiny_recipe(), "fresh")
    older = save_state(run, 1, keep=1, write=write_step)
    with pytest.raises(RunError, match=r"step 2 .*No space left"):
        save_state(run, 2, keep=1, write=fails_half_way)
    assert run.states() == [older]
    assert (older / "weights").read_text() == "whole"
    assert not list((tmp_path / "run" / "state").glob(".partial*"))


def test_a_state_that_was_being_written_is_no_state(tmp_path):
    run = prepare(tmp_path / "run", tiny_recipe(), "fresh")
    (tmp_path / "run" / "state" / ".partial-00000005").mkdir()
    assert run.states() == []


@pytest.fixture
def state(tmp_path):
    """A whole state with two files, one of them in a sub-folder."""

    def write(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_bytes(b"0123456789")
        (folder / "progress.json").write_text("{}")

    run = prepare(tmp_path / "run", tiny_recipe(), "fresh")
    return save_state(run, 5, keep=1, write=write)


def test_the_manifest_has_size_and_hash_of_every_file(state):
    files = json.loads((state / MANIFEST).read_text())["files"]
    assert files.keys() == {"inner/weights", "progress.json"}
    assert files["inner/weights"] == {
        "bytes": 10,
        "sha256": "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882",
    }
    assert fault(state) is None


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda state: (state / "inner" / "weights").write_bytes(b"01234"), "inner/weights has 5 bytes"),
        (lambda state: (state / "inner" / "weights").write_bytes(b"0123456780"), "inner/weights is damaged"),
        (lambda state: (state / "progress.json").unlink(), "progress.json is missing"),
        (lambda state: (state / MANIFEST).unlink(), "it has no manifest.json"),
        (lambda state: (state / MANIFEST).write_text("{"), "its manifest.json can't be read"),
        (lambda state: (state / MANIFEST).write_text("[]"), "its manifest.json can't be read"),
    ],
)
def test_every_kind_of_damage_is_found(state, harm, reason):
    harm(state)
    assert reason in fault(state)


def test_the_newest_whole_state_is_found_and_the_others_are_named(tmp_path):
    run = prepare(tmp_path / "run", tiny_recipe(), "fresh")
    for step in (1, 2, 3):
        save_state(run, step, keep=3, write=write_step)
    for step in (2, 3):
        (run.path / "state" / f"step-0000000{step}" / "weights").write_text("")
    found, passed_over = newest_whole(run)
    assert found.name == "step-00000001"
    assert [reason.split(":")[0] for reason in passed_over] == ["step-00000003", "step-00000002"]
    set_aside_newer(run, found)
    assert run.states() == [found]
    for step in (2, 3):  # which must not push the good ones out
        save_state(run, step, keep=2, write=write_step)
    assert [state.name for state in run.states()] == ["step-00000002", "step-00000003"]


def test_a_state_can_be_found_torn_more_than_once(tmp_path):
    run = prepare(tmp_path / "run", tiny_recipe(), "fresh")
    older = save_state(run, 1, keep=3, write=write_step)
    for _ in range(2):
        save_state(run, 2, keep=3, write=write_step)
        set_aside_newer(run, older)
    assert run.states() == [older]


def test_a_read_error_is_a_fault_and_not_the_end(state, monkeypatch):
    def fails(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("itarflow.training.states._digest", fails)
    assert "Input/output error" in fault(state)


def test_saving_a_step_again_replaces_it_whole(state, tmp_path):
    run = prepare(tmp_path / "run", tiny_recipe(), "resume")
    save_state(run, 5, keep=1, write=write_step, progress={"step": 5})
    assert fault(state) is None
    assert json.loads((state / "progress.json").read_text()) == {"step": 5}
    assert [path.name for path in state.parent.iterdir()] == ["step-00000005"]


def test_without_a_whole_state_there_is_none(state, tmp_path):
    os.remove(state / MANIFEST)
    found, passed_over = newest_whole(prepare(tmp_path / "run", tiny_recipe(), "resume"))
    assert found is None
    assert passed_over == ["step-00000005: it has no manifest.json"]


def test_processes_that_are_not_the_main_one_leave_the_folder_to_it(tmp_path):
    run = prepare(tmp_path / "run", tiny_recipe(), "fresh")
    (run.path / "state" / ".partial-00000001").mkdir()
    save_state(run, 1, keep=1, write=write_step, on_main=lambda action: None)
    assert run.states() == []
    assert (run.path / "state" / ".partial-00000001" / "weights").exists()
