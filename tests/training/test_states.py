"""Saved states are whole or not there, and a damaged one is told from a whole one."""

import json
import os
import shutil
import tarfile

import pytest
from tiny_training import claimed_run, tiny_recipe

from itarflow.data.identity import DataIdentity
from itarflow.runtime.errors import DataError, RunError
from itarflow.training import states
from itarflow.training.run_folder import RunDir
from itarflow.training.states import (
    MANIFEST,
    check_same_data,
    check_stateless,
    exported_data,
    fault,
    newest_whole,
    read_progress,
    save_state,
    set_aside_newer,
)


def write_step(folder):
    (folder / "weights").write_text("whole")


def progress(step, **more):
    return {"step": step, "seconds": 1.5, "bad_steps": 0, "broken": [], "run": "ours"} | more


def save(run_dir, *steps, keep=2, **more):
    for step in steps:
        save_state(run_dir, step, keep, write_step, progress(step, **more))


def test_only_the_newest_states_are_kept(tmp_path):
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    save(run, 10, 200, 3000)
    assert [state.name for state in run.states()] == ["step-00000200", "step-00003000"]


def test_a_step_of_more_digits_is_newer(tmp_path):
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    save(run, 99_999_998, 99_999_999, 100_000_000)
    assert [state.name for state in run.states()] == ["step-99999999", "step-100000000"]


def test_states_of_another_run_are_never_removed(tmp_path):
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    save(run, 1, 6, 7, run="another", keep=3)
    save(run, 2, 3, 4, keep=1)
    save(run, 8, keep=1, run="another")
    assert [state.name[-1] for state in run.states()] == ["4", "8"]


def test_states_of_before_runs_had_names_are_pruned_as_ever(tmp_path):
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    for step in (1, 2, 3):
        save_state(run, step, 2, write_step, {key: value for key, value in progress(step).items() if key != "run"})
    assert [state.name[-1] for state in run.states()] == ["2", "3"]


def test_what_is_no_state_neither_counts_nor_is_touched(tmp_path):
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    save(run, 4)
    folder = run.path / "state"
    shutil.copytree(folder / "step-00000004", folder / "step-00000004-best")
    shutil.copytree(folder / "step-00000004", tmp_path / "disk")
    (folder / "step-00000005").symlink_to(tmp_path / "disk")
    (folder / "step-00000003").symlink_to(tmp_path / "nowhere")
    with tarfile.open(folder / "step-00000004.tar.gz", "w:gz") as file:
        file.add(folder / "step-00000004", "step-00000004")
    (folder / "step-7").mkdir()
    before = {path.name for path in folder.iterdir()} - {"step-00000004"}
    assert [state.name for state in run.states()] == ["step-00000004"]
    save(run, 6, 8, keep=1)
    assert {path.name for path in folder.iterdir()} == before | {"step-00000008"}
    assert (tmp_path / "disk" / "weights").exists()
    set_aside_newer(run, folder / "step-00000001")
    assert run.states() == []


def test_a_run_whose_states_are_gone_is_not_begun_anew_over_what_is_left(tmp_path):
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    (run.path / "state" / ".partial-00000001").mkdir()
    check_stateless(run)  # killed before its first state
    (run.path / "pipeline").mkdir()
    with pytest.raises(RunError, match=r"no saved state to go on from, but pipeline\. .*--restart"):
        check_stateless(run)
    (tmp_path / "disk").mkdir()
    (run.path / "state" / "step-00000004").symlink_to(tmp_path / "disk")
    with pytest.raises(RunError, match=r"but state/step-00000004, pipeline\. .*no links"):
        check_stateless(run)


def test_a_link_where_a_state_is_saved_is_put_aside_and_what_it_leads_to_is_not_touched(tmp_path):
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    (tmp_path / "disk").mkdir()
    (run.path / "state" / "step-00000004").symlink_to(tmp_path / "disk")
    (run.path / "state" / ".partial-00000004").symlink_to(tmp_path / "disk")
    save(run, 4)
    assert fault(run.path / "state" / "step-00000004") is None
    assert list((tmp_path / "disk").iterdir()) == []
    assert sum(path.is_symlink() for path in (run.path / "state").iterdir()) == 1


def test_a_state_that_can_not_be_removed_is_named_and_nothing_is_lost(tmp_path, monkeypatch):
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    save(run, 1)
    real = os.replace

    def replace(one, other):
        if one.name == "step-00000001":
            raise PermissionError(13, "Permission denied")
        real(one, other)

    monkeypatch.setattr(states.os, "replace", replace)
    said = []
    save_state(run, 2, 1, write_step, progress(2), warn=said.append)
    assert len(said) == 1
    assert "step-00000001 is no longer needed, but can't be removed (Permission denied)" in said[0]
    assert [fault(state) for state in run.states()] == [None, None]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "Expected `object`"),
        (progress(5) | {"step": "5"}, r"step"),
        (progress(5) | {"step": -1}, r"step"),
        (progress(5) | {"broken": {"a": 1}}, r"broken"),
        (progress(5) | {"data": {"content": 3}}, r"data\.content"),
        ({"step": 5}, "seconds"),
        (progress(6), "is of step 6"),
    ],
)
def test_progress_of_another_shape_is_a_message(state, values, message):
    (state / "progress.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=rf"progress\.json .*{message}"):
        read_progress(state)


def test_progress_comes_back_with_what_a_training_adds(tmp_path):
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    identity = DataIdentity(content="a", images={"train": 3}, class_names=("a", "b"), class_counts=(1, 2))
    save(run, 5, data=identity.to_json(), before={"0.1": 20.0})
    found, own = read_progress(run.states()[0])
    assert (found.step, found.run, found.data, own) == (5, "ours", identity, {"before": {"0.1": 20.0}})


def test_other_images_are_refused_unless_that_is_allowed(tmp_path):
    there = DataIdentity(content="a", images={"train": 36}, class_names=("a", "b", "c"), class_counts=(12, 12, 12))
    now = DataIdentity(content="b", images={"train": 60}, class_names=("a", "c", "zz"), class_counts=(20, 20, 20))
    with pytest.raises(RunError, match=r"(?s)a, b, c\] there, \[a, c, zz\] now .*36 there, 60 now.*--allow-changes"):
        check_same_data(tmp_path, there, now, allowed=False)
    assert len(check_same_data(tmp_path, there, now, allowed=True)) == 2
    assert check_same_data(tmp_path, there, there, allowed=False) == []
    assert check_same_data(tmp_path, None, now, allowed=False) == []  # a state of before it was stored


def test_images_that_are_read_in_another_way_are_said_and_the_rest_is_compared(tmp_path, monkeypatch):
    run, said = claimed_run(tmp_path / "run", tiny_recipe(), "fresh"), []
    save(run, 5, data=DataIdentity(content="rows:a", images={"train": 3}).to_json())
    monkeypatch.setattr(states, "agreed_state", lambda run, *_: run.states()[0])

    def resume(content, count):
        now = DataIdentity(content=content, images={"train": count})
        states.open_state(run, None, now, False, lambda text, colour: said.append(text))

    resume("rows:a", 3)
    assert said == []
    resume("files:b", 3)
    assert "read in another way" in said.pop()
    for content, count in (("rows:b", 3), ("files:b", 4)):
        with pytest.raises(RunError, match="images"):
            resume(content, count)


@pytest.mark.parametrize(
    "content", [None, "{", "[]", "{}", '{"training": null}', '{"training": {"train_images": "x"}}']
)
def test_without_a_record_in_the_pipeline_older_states_are_not_compared(tmp_path, content):
    now = DataIdentity(content="b", images={"train": 6, "held out": 2}, class_names=("1", "2"), class_counts=(3, 3))
    (tmp_path / "pipeline").mkdir()
    if content is not None:
        (tmp_path / "pipeline" / "model_index.json").write_text(content)
    assert exported_data(RunDir(tmp_path), now) is None


def test_older_states_are_of_the_classes_and_numbers_of_images_that_the_pipeline_has(tmp_path):
    now = DataIdentity(content="b", images={"train": 6, "held out": 2}, class_names=("1", "2"), class_counts=(3, 3))
    (tmp_path / "pipeline").mkdir()
    for names, images, found in (
        (["1", "2"], (6, 2), 0), (None, (6, 2), 0), (["2", "1"], (6, 2), 1), (["1", "2"], (7, 1), 2), (None, (6, 0), 1)
    ):  # fmt: skip
        record = {"train_images": images[0], "held_out_images": images[1], "name": "tiny"}
        index = {"class_names": names, "training": record, "flow": ["itarflow", "TARFlow"]}
        (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
        assert len(exported_data(RunDir(tmp_path), now).differences(now)) == found


def test_a_disk_that_fills_up_leaves_the_older_state_whole(tmp_path):
    def fails_half_way(folder):
        (folder / "weights").write_text("ha")
        raise OSError(28, "No space left on device")

    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    older = save_state(run, 1, keep=1, write=write_step)
    with pytest.raises(RunError, match=r"step 2 .*No space left"):
        save_state(run, 2, keep=1, write=fails_half_way)
    assert run.states() == [older]
    assert (older / "weights").read_text() == "whole"
    assert not list((tmp_path / "run" / "state").glob(".partial*"))


def test_a_state_that_was_being_written_is_no_state(tmp_path):
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    (tmp_path / "run" / "state" / ".partial-00000005").mkdir()
    assert run.states() == []


@pytest.fixture
def state(tmp_path):
    """A whole state with two files, one of them in a sub-folder."""

    def write(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_bytes(b"0123456789")
        (folder / "progress.json").write_text("{}")

    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    return save_state(run, 5, keep=1, write=write)


def test_the_manifest_has_size_and_hash_of_every_file(state):
    files = json.loads((state / MANIFEST).read_text())["files"]
    assert files.keys() == {"inner/weights", "progress.json"}
    assert files["inner/weights"] == {
        "bytes": 10,
        "sha256": "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882",
    }
    assert fault(state) is None


def rename_in_manifest(state, name):
    manifest = json.loads((state / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"].pop("progress.json")
    (state / MANIFEST).write_text(json.dumps(manifest))


def link(state, name):
    (state / name).rename(state.parent.parent / "elsewhere")
    (state / name).symlink_to(state.parent.parent / "elsewhere")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda state: (state / "inner" / "weights").write_bytes(b"01234"), "inner/weights has 5 bytes"),
        (lambda state: (state / "inner" / "weights").write_bytes(b"0123456780"), "inner/weights is damaged"),
        (lambda state: (state / "progress.json").unlink(), "progress.json is missing"),
        (lambda state: (state / MANIFEST).unlink(), "it has no manifest.json"),
        (lambda state: (state / MANIFEST).write_text("{"), "its manifest.json can't be read"),
        (lambda state: (state / MANIFEST).write_text("[]"), "its manifest.json can't be read"),
        (
            lambda state: (state / MANIFEST).write_text('{"files": {"a": {"bytes": "x"}}}'),
            "its manifest.json can't be",
        ),
        (lambda state: rename_in_manifest(state, "../outside"), "names ../outside, which is elsewhere"),
        (lambda state: rename_in_manifest(state, "/dev/zero"), "names /dev/zero, which is elsewhere"),
        (lambda state: link(state, "inner"), "inner/weights is a link"),
        (lambda state: link(state, "progress.json"), "progress.json is a link"),
    ],
)
def test_every_kind_of_damage_is_found(state, harm, reason):
    harm(state)
    assert reason in fault(state)


def test_the_newest_whole_state_is_found_and_the_others_are_named(tmp_path):
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    save(run, 1, 2, 3, keep=3)
    for step in (2, 3):
        (run.path / "state" / f"step-0000000{step}" / "weights").write_text("")
    found, passed_over = newest_whole(run)
    assert found.name == "step-00000001"
    assert [reason.split(":")[0] for reason in passed_over] == ["step-00000003", "step-00000002"]
    set_aside_newer(run, found)
    assert run.states() == [found]
    save(run, 2, 3)  # which the torn ones must not push out
    assert [state.name for state in run.states()] == ["step-00000002", "step-00000003"]


def test_a_state_can_be_found_torn_more_than_once(tmp_path):
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    older = save_state(run, 1, keep=3, write=write_step)
    for _ in range(2):
        save_state(run, 2, keep=3, write=write_step)
        set_aside_newer(run, older)
    assert run.states() == [older]


def test_a_read_error_is_a_fault_and_not_the_end(state, monkeypatch):
    def fails(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("itarflow.training.states.file_sha256", fails)
    assert "Input/output error" in fault(state)


def test_saving_a_step_again_replaces_it_whole(state, tmp_path):
    run = claimed_run(tmp_path / "run", tiny_recipe(), "resume")
    save_state(run, 5, keep=1, write=write_step, progress=progress(5))
    assert fault(state) is None
    assert json.loads((state / "progress.json").read_text()) == progress(5)
    assert [path.name for path in state.parent.iterdir()] == ["step-00000005"]


def test_without_a_whole_state_there_is_none(state, tmp_path):
    os.remove(state / MANIFEST)
    found, passed_over = newest_whole(claimed_run(tmp_path / "run", tiny_recipe(), "resume"))
    assert found is None
    assert passed_over == ["step-00000005: it has no manifest.json"]


def test_processes_that_are_not_the_main_one_leave_the_folder_to_it(tmp_path):
    run = claimed_run(tmp_path / "run", tiny_recipe(), "fresh")
    (run.path / "state" / ".partial-00000001").mkdir()
    save_state(run, 1, keep=1, write=write_step, on_main=lambda action: None)
    assert run.states() == []
    assert (run.path / "state" / ".partial-00000001" / "weights").exists()
