"""The files in recipes/launch/: Accelerate reads them, and a SLURM job that is stopped queues itself again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from tiny_training import tiny_recipe

from itarflow.training.sharding import launcher_asks_for_checkpointing, launcher_asks_for_sharding
from itarflow.training.train import train

LAUNCH = Path(__file__).parents[2] / "recipes" / "launch"
FILES = {"cpu": ("MULTI_GPU", 2), "gpu": ("NO", 1), "gpus8": ("MULTI_GPU", 8), "nodes": ("MULTI_GPU", 16),
         "fsdp2": ("FSDP", 8)}  # fmt: skip


def test_every_file_is_known_here():
    assert {file.stem for file in LAUNCH.glob("*.yaml")} == FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_processes) == FILES[name]
    assert config.mixed_precision == "no"
    assert not config.use_cpu


@pytest.mark.slow
def test_sharding_and_checkpointing_are_asked_of_every_process(tmp_path):
    script = tmp_path / "tell.py"
    script.write_text(
        "import os\n"
        "names = ('WORLD_SIZE', 'ACCELERATE_USE_FSDP', 'FSDP_ACTIVATION_CHECKPOINTING')\n"
        f"open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(' '.join(os.environ[name] for name in names))\n"
    )
    command = [
        Path(sys.executable).with_name("accelerate"),
        "launch",
        "--config_file",
        LAUNCH / "fsdp2.yaml",
        "--num_processes",
        "2",
        script,
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 true true"] * 2


def test_engines_that_are_not_ours_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"asks for DEEPSPEED.*fsdp2\.yaml or --train\.shard"):
        train(tiny_recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_the_launcher_asks_for_is_read_from_its_variables(monkeypatch):
    assert not launcher_asks_for_sharding()
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    assert not launcher_asks_for_checkpointing()  # only together with sharding
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert launcher_asks_for_sharding()
    assert launcher_asks_for_checkpointing()


@pytest.fixture
def cluster(tmp_path):
    """A PATH on which SLURM's commands only note how they are called; the training runs until it is told to stop."""
    commands = tmp_path / "bin"
    commands.mkdir()
    stop = tmp_path / "stop"
    (commands / "scontrol").write_text(
        f'#!/bin/sh\necho "scontrol $*" >> {tmp_path}/calls\n[ $1 = requeue ] || echo node7\n'
    )
    (commands / "srun").write_text(
        f'#!/bin/sh\necho "srun $*" >> {tmp_path}/calls\n'
        f'case "$*" in *pkill*) touch {stop}; exit;; esac\n'
        f"for i in $(seq 100); do [ -e {stop} ] && exit 1; sleep 0.1; done\n"
    )
    for command in commands.iterdir():
        command.chmod(0o755)
    return {
        **os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": "123", "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_GPUS_ON_NODE": "4",
    }  # fmt: skip


def submit(cluster, run_dir):
    words = [str(run_dir), "recipes/x.py", "--train.epochs", "7"]
    return subprocess.Popen(["bash", str(LAUNCH / "slurm.sh"), *words], env=cluster, stdout=subprocess.PIPE, text=True)


def calls(tmp_path):
    return (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""


def wait_for(text, tmp_path):
    for _ in range(100):
        if text in calls(tmp_path):
            return
        time.sleep(0.05)
    pytest.fail(f"{text} was never called: {calls(tmp_path)}")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_is_told_to_stop_queues_itself_again(cluster, tmp_path, number):
    job = submit(cluster, tmp_path / "run")
    wait_for("bash -c", tmp_path)
    job.send_signal(number)
    out, _ = job.communicate(timeout=20)
    assert job.returncode == 0
    assert "queues itself again" in out
    assert "pkill -TERM -P" in calls(tmp_path)
    assert "stop recipes/x.py" in calls(tmp_path)
    assert calls(tmp_path).endswith("scontrol requeue 123\n")


@pytest.mark.parametrize("exists", [False, True])
def test_a_run_that_exists_is_resumed_and_a_failed_one_is_not_queued_again(cluster, tmp_path, exists):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    if exists:
        (run_dir / "recipe.json").write_text("{}")
    (tmp_path / "stop").write_text("")
    job = submit(cluster, run_dir)
    job.communicate(timeout=20)
    assert job.returncode == 1
    resume = " --resume" if exists else ""
    assert f"launch 8 node7 recipes/x.py --run-dir {run_dir}{resume} --train.epochs 7" in calls(tmp_path)
    assert "requeue" not in calls(tmp_path)
