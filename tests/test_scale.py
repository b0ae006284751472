"""Many nodes: the launchers in training/cluster/ start, stop and continue a run, and who writes what."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from test_trainer import ROOT, weights

from diffusers_vae.config import TRAININGS, parse_settings

CLUSTER = ROOT / "training" / "cluster"
SLURM, NODE, KUBERNETES = (CLUSTER / name for name in ("slurm.sh", "node.sh", "kubernetes.yaml"))
TINY = [
    "--data.resolution", 8, "--model.block_out_channels", "[8,8]", "--model.norm_num_groups", 4,
    "--run.batch_size", 60, "--run.max_images", 1800, "--run.log_every", 240, "--run.checkpoint_every", 600,
    "--run.keep_checkpoints", 100, "--run.mixed_precision", "no", "--evaluation.max_images", 64,
]  # fmt: skip


def settings_of(*flags):
    """What training/train_vae.py makes of the flags; they end the process if it knows them not."""
    return parse_settings(TRAININGS["train"], [str(flag) for flag in flags])[0]


class TestSyntax:
    @pytest.mark.parametrize("script", [SLURM, NODE], ids=lambda script: script.name)
    def test_of_the_scripts(self, script):
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert os.access(script, os.X_OK)

    def test_of_what_slurm_is_asked_for(self):
        text = SLURM.read_text()
        head = text[: text.index("\nset -")]  # after the first command, sbatch reads no more
        assert text.count("#SBATCH") == head.count("#SBATCH")
        asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", head, re.M))
        assert len(asked) == head.count("#SBATCH")
        assert asked["nodes"] == "2" and asked["ntasks-per-node"] == "1" and asked["gpus-per-node"] == "8"
        assert asked["signal"] == "B:USR1@600" and asked["requeue"] == "" and asked["open-mode"] == "append"
        assert re.fullmatch(r"\d+:\d\d:\d\d", asked["time"])

    def test_accelerate_knows_its_flags(self):
        command = re.search(
            r"^accelerate launch(.*?) training/train_vae\.py", NODE.read_text().replace("\\\n", ""), re.M
        )
        values = {"$NODES": "2", "$((NODES * PROCESSES_PER_NODE))": "16", "$rank": "1", "$MAIN_PORT": "29500"}
        line = command[1]
        for name, value in values.items():
            line = line.replace(f'"{name}"', value).replace(name, value)
        parsed = launch_command_parser().parse_args([*shlex.split(line), "training/train_vae.py", "--a", "b"])
        assert (parsed.num_machines, parsed.num_processes, parsed.machine_rank) == (2, 16, 1)
        assert parsed.main_process_ip == "$MAIN_HOST" and parsed.main_process_port == 29500
        assert (ROOT / parsed.config_file).exists() and parsed.training_script_args == ["--a", "b"]

    def test_of_what_kubernetes_is_asked_for(self):
        service, job = yaml.safe_load_all(KUBERNETES.read_text())
        assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
        assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
        assert service["spec"]["clusterIP"] == "None"  # a text, in YAML: no null
        spec = job["spec"]
        pod = spec["template"]["spec"]
        labels = spec["template"]["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= labels.items()
        (nodes,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert nodes["labelSelector"]["matchLabels"] == labels
        (container,) = pod["containers"]
        assert all(isinstance(entry["value"], str) for entry in container["env"])
        given = {entry["name"]: entry["value"] for entry in container["env"]}
        assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == int(given["NODES"])
        assert given["MAIN_HOST"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
        assert pod["subdomain"] == service["metadata"]["name"]
        assert pod["restartPolicy"] == "OnFailure" and pod["terminationGracePeriodSeconds"] >= 300
        assert container["command"] == ["bash", str(NODE.relative_to(ROOT))]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(given["PROCESSES_PER_NODE"])
        assert given.keys() == set(re.findall(r"^#   (\w+)(?:, (\w+))?", NODE.read_text(), re.M)[0]) | set(
            re.findall(r"^#   (\w+)  ", NODE.read_text(), re.M)
        ) | {"MAIN_HOST", "MAIN_PORT"}

    def test_of_the_volumes(self):
        _, job = yaml.safe_load_all(KUBERNETES.read_text())
        pod = job["spec"]["template"]["spec"]
        volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
        places = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert places.keys() == volumes.keys()
        given = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
        assert places["memory"] == "/dev/shm" and volumes["memory"]["emptyDir"]["medium"] == "Memory"
        assert "persistentVolumeClaim" in volumes["shared"] and "emptyDir" in volumes["node-disk"]
        assert given["NODE_DISK"] == places["node-disk"] and given["ARCHIVES"].startswith(places["shared"])

    def test_training_knows_its_flags(self, monkeypatch):
        monkeypatch.chdir(ROOT)
        _, job = yaml.safe_load_all(KUBERNETES.read_text())
        (container,) = job["spec"]["template"]["spec"]["containers"]
        added = shlex.split(re.search(r'set -- "\$@" (.*)', NODE.read_text())[1])
        config = settings_of(*container["args"], *added)
        assert config.run.output_dir.startswith("/shared/") and config.data.name == "folder"
        given = {entry["name"]: int(entry["value"]) for entry in container["env"] if entry["value"].isdecimal()}
        processes = given["NODES"] * given["PROCESSES_PER_NODE"]
        assert config.run.batch_size % (processes * config.run.gradient_accumulation_steps) == 0


STUBS = {
    # starts its command as the tasks of two nodes, passes signals on, and ends all when one fails
    "srun": """#!{python}
import os, signal, subprocess, sys
command = [argument for argument in sys.argv[1:] if argument != "--kill-on-bad-exit=1"]
tasks = []
for node in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
    own = dict(os.environ, SLURM_NODEID=str(node), NODE_DISK=os.environ["NODE_DISK"] + f"/{{node}}", NODE=str(node))
    os.makedirs(own["NODE_DISK"], exist_ok=True)
    umask = (0o022, 0o077)[node]
    tasks.append(subprocess.Popen(command, env=own, umask=umask, start_new_session=True))
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: [task.send_signal(number) for task in tasks])
codes = []
while len(codes) < len(tasks):
    os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
    codes = [task.poll() for task in tasks if task.poll() is not None]
    if any(codes):
        [task.terminate() for task in tasks]
        codes = [task.wait() for task in tasks]
sys.exit(max(abs(code) for code in codes))
""",
    "scontrol": """#!/bin/bash
case $1 in
    show) echo localhost ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
esac
""",
}
WATCH = """
import os, sys
def note(event, arguments):
    if event == "open":
        path, _, flags = arguments
        changed = [path] if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else []
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink"):
        changed = [argument for argument in arguments if isinstance(argument, (str, bytes, os.PathLike))]
    else:
        return
    for path in changed:
        if isinstance(path, int) or not os.fsdecode(path).startswith(os.environ["WATCHED"] + "/"):
            continue
        with open(os.environ["NODE_DISK"] + "/written", "a") as log:
            log.write(os.fsdecode(path) + "\\n")
if "RANK" in os.environ:
    sys.addaudithook(note)
"""
"""What Python itself writes, each process that trains notes on its node's disk."""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Starts training/cluster/slurm.sh as SLURM does on two nodes, which are two groups of processes here."""
    folder = tmp_path_factory.mktemp("slurm")
    for name, text in STUBS.items():
        (folder / name).write_text(text.format(python=sys.executable) if name == "srun" else text)
        (folder / name).chmod(0o755)
    cli = f'exec {sys.executable} -m accelerate.commands.accelerate_cli "$@"'
    (folder / "accelerate").write_text(f"#!/bin/bash\n{cli}\n")
    (folder / "sitecustomize.py").write_text(WATCH)
    (folder / "accelerate").chmod(0o755)

    def start(output_dir, *flags, **environment):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            number = 20000 + free.getsockname()[1] % 10000 - 20000  # from which the script makes a port
        environment = {
            "PATH": f"{folder}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "SLURM_JOB_ID": str(number),
            "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "local[0-1]", "PROCESSES_PER_NODE": "1",
            "NODE_DISK": str(output_dir) + "-disks", "REQUEUED": str(output_dir) + "-requeued",
            "PYTHONPATH": f"{folder}:{ROOT}", "WATCHED": str(output_dir), "OMP_NUM_THREADS": "1",
        } | environment  # fmt: skip
        return subprocess.Popen(
            ["bash", str(SLURM), *map(str, [*TINY, "--run.output_dir", output_dir, *flags])], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=os.environ | environment,
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def uninterrupted(slurm, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = slurm(output_dir)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    return output_dir, output


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
class TestSlurm:
    def test_a_run_of_two_nodes(self, uninterrupted):
        output_dir, output = uninterrupted
        assert re.search("float32 on 2 x cpu.*, 30 images per forward", output), output
        assert (output_dir / "evaluation.json").exists() and not Path(f"{output_dir}-requeued").exists()

    def test_saved_before_its_time_is_over_and_queued_again(self, slurm, uninterrupted, tmp_path):
        output_dir = tmp_path / "run"
        process = slurm(output_dir)
        deadline = time.monotonic() + 120
        while not any((output_dir / "checkpoints").glob("images-*")):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 75, output
        assert "asked to stop (SIGUSR1)" in output and "saved as" in output
        assert len(Path(f"{output_dir}-requeued").read_text().split()) == 1
        assert not (output_dir / "evaluation.json").exists()
        again = slurm(output_dir)
        output = again.communicate(timeout=240)[0]
        assert again.returncode == 0 and "continuing from" in output, output
        assert len(Path(f"{output_dir}-requeued").read_text().split()) == 1
        first, second = weights(uninterrupted[0]), weights(output_dir)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert (output_dir / "metrics.jsonl").read_text() == (uninterrupted[0] / "metrics.jsonl").read_text()

    def test_only_its_own_part_of_a_checkpoint_is_not_written_by_the_main_process(self, uninterrupted):
        output_dir, _ = uninterrupted
        # the second node's umask leaves what it makes to its owner alone, be it made by Python or not
        files = [path for path in output_dir.rglob("*") if path.is_file()]
        by_second = {str(path.relative_to(output_dir)) for path in files if not path.stat().st_mode & 0o044}
        checkpoints = [path.name for path in (output_dir / "checkpoints").iterdir()]
        assert len(checkpoints) == 3 and len(files) > 20
        assert by_second == {f"checkpoints/{name}/process-00001.json" for name in checkpoints}
        # nor did it touch what the other had made
        first, second = ((Path(f"{output_dir}-disks") / node / "written").read_text().split() for node in "01")
        assert {Path(path).name for path in second} == {"process-00001.json"}
        assert {"metrics.jsonl", "manifest.json", ".lock"} <= {Path(path).name for path in first}
