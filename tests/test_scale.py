"""Many nodes: the launchers in training/cluster/ start, stop and continue a run, and who writes what."""

import dataclasses
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import scale
import yaml
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from support.launches import run_forked
from support.runs import ROOT, left_behind

from diffusers_vae.cli.parser import TRAININGS, parse_settings
from diffusers_vae.losses.adversarial import PatchDiscriminator
from diffusers_vae.models import ModelConfig
from diffusers_vae.tasks.autoencoder import train

CLUSTER = ROOT / "training" / "cluster"
SLURM, NODE, KUBERNETES = (CLUSTER / name for name in ("slurm.sh", "node.sh", "kubernetes.yaml"))
TINY = [
    "--data.resolution", 8, "--model.block_out_channels", "[8,8]", "--model.norm_num_groups", 4,
    "--run.batch_size", 60, "--run.max_images", 3600, "--run.log_every", 240, "--run.checkpoint_every", 600,
    "--run.keep_checkpoints", 100, "--run.mixed_precision", "no", "--run.tracker", "null",
    "--evaluation.max_images", 64,
]  # fmt: skip


def settings_of(*flags):
    """What training/train_vae.py makes of the flags; they end the process if it knows them not."""
    return parse_settings(TRAININGS["train"], [str(flag) for flag in flags])[0]


class TestSyntax:
    @pytest.mark.parametrize("script", [SLURM, NODE], ids=lambda script: script.name)
    def test_scripts_parse_and_may_be_run(self, script):
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert os.access(script, os.X_OK)

    def test_slurm_is_asked_for_nodes_gpus_a_signal_and_to_requeue(self):
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

    def test_kubernetes_is_asked_for_a_service_and_a_job(self):
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

    def test_volumes_are_mounted_where_the_script_looks(self):
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


COUNTED = scale.Counted(
    parameters=10**8, discriminator=10**7, checkpoint=2 * 10**9, step_bf16=1e12, step_float32=1e11, forward=3e11
)
MEASURED = scale.Measured(
    decode={"kind": 100.0}, headers=1000.0, headers_in_tar=2000.0, bytes_per_file=500.0, permutation=1e-7,
    checkpoint_write=5e8, checkpoint_read=1e9,
)  # fmt: skip
ASSUMED = scale.Assumed(
    gpus_per_node=8, cores_per_node=72, gpu_bf16=1e15, gpu_tf32=5e14, gpu_used=0.5, gpu_memory=1e12, gpu_copy=1e10,
    gpu_link=1e11, node_link=1e10, node_read=1e9, shared_read=4e9, shared_write=1e9, shared_opens=1e4, disk_read=2e9,
)  # fmt: skip
RECIPE = scale.Recipe("a set", 1_024_000, 1e5, "kind", 4, 512, 512_000, 1_024_000, 6400)


def estimated(gpus=8, recipe=RECIPE, measured=MEASURED, assumed=ASSUMED, **way):
    return scale.estimate(recipe, gpus, COUNTED, measured, assumed, **way)


class TestEstimate:
    def test_in_numbers_that_can_be_checked_by_hand(self):
        found = estimated(num_workers=4)
        assert found.overlapping == {
            "read": pytest.approx(512 * 1e5 / 1e9),
            "open files": 0,
            "decode": pytest.approx(512 / (8 * 4 * 100)),
            "copy to GPU": pytest.approx(64 * 196_608 / 1e10),
            "compute": pytest.approx(64 * (1e12 / 1e15 + 1e11 / 5e14) / 0.5),
            "all-reduce": pytest.approx(2 * 7 / 8 * 4e8 / 1e11),
        }
        after = {"optimiser": 9 * 4e8 / 1e12, "all-reduce of the discriminator": 2 * 7 / 8 * 4e7 / 1e11}
        assert found.after == pytest.approx(after)
        assert (found.steps_per_epoch, found.steps) == (2000, 8000)
        assert found.once == pytest.approx(
            {
                "copy to the disks": 0,
                "check headers": 2 * 1_024_000 / 2000,
                "order of images": 4 * 1_024_000 * 1e-7,
                "checkpoints": 8 * 2e9 / 5e8,
                "evaluations": 4 * 6400 * (3e11 / (8 * 2.5e14) + 1 / (4 * 8 * 100)),
            }
        )

    def test_a_step_is_the_slowest_of_what_overlaps_and_all_that_does_not(self):
        found = estimated()
        assert found.step == max(found.overlapping.values()) + sum(found.after.values())
        assert found.epoch == 2000 * found.step
        assert found.whole == pytest.approx(4 * found.epoch + sum(found.once.values()))

    def test_twice_the_gpus_halve_what_they_compute(self):
        for gpus in (8, 16, 32):
            few, many = estimated(gpus), estimated(2 * gpus)
            for name in ("compute", "copy to GPU", "decode"):
                assert many.overlapping[name] == pytest.approx(few.overlapping[name] / 2)
            assert many.after["optimiser"] == few.after["optimiser"]  # each has the whole model
            assert many.overlapping["all-reduce"] > few.overlapping["all-reduce"]

    @pytest.mark.parametrize(
        ("assumption", "stage"),
        [("node_read", "read"), ("gpu_copy", "copy to GPU"), ("gpu_used", "compute"), ("gpu_link", "all-reduce")],
    )
    def test_what_is_a_thousand_times_slower_saturates(self, assumption, stage):
        slower = dataclasses.replace(ASSUMED, **{assumption: getattr(ASSUMED, assumption) / 1000})
        found = estimated(assumed=slower)
        assert found.saturated[0] == stage
        assert found.overlapping[stage] == pytest.approx(1000 * estimated().overlapping[stage])

    def test_storage_is_shared_and_disks_are_not(self):
        rates = {nodes: 512 * 1e5 / estimated(8 * nodes).overlapping["read"] for nodes in (1, 2, 4, 8)}
        assert rates == pytest.approx({1: 1e9, 2: 2e9, 4: 4e9, 8: 4e9})
        on_disk = estimated(64, on_disk=True)
        assert on_disk.overlapping["read"] == pytest.approx(512 * 1e5 / (8 * 2e9))
        assert on_disk.once["copy to the disks"] == pytest.approx(8 * 1_024_000 * 1e5 / 4e9)  # each node has it all

    def test_files_by_themselves_are_opened_one_by_one(self):
        assert estimated(stored="files").overlapping["open files"] == pytest.approx(512 / 1e4)
        assert estimated(stored="files").once["check headers"] == pytest.approx(2 * 1_024_000 / 1000)
        slow = dataclasses.replace(ASSUMED, shared_opens=100.0)
        # of each of the 16 processes, since each looks for itself
        assert estimated(16, assumed=slow, stored="files").once["check headers"] == pytest.approx(16 * 1_024_000 / 100)

    def test_a_stream_is_neither_checked_nor_ordered_by_images(self):
        once = estimated(stored="stream").once
        assert once["check headers"] == once["order of images"] == 0

    def test_there_are_no_more_workers_than_cores(self):
        assert estimated(num_workers=100).overlapping["decode"] == pytest.approx(512 / (64 * 100))

    def test_one_process_sums_nothing(self):
        assert scale.all_reduce(4e8, 1, 1, ASSUMED) == 0
        assert scale.all_reduce(4e8, 1, 2, ASSUMED) == pytest.approx(4e8 / 1e10)

    def test_names_and_orders_take_the_memory_of_every_process(self):
        names, orders = scale.memory_of_names(RECIPE, MEASURED, ASSUMED)
        assert (names, orders) == (8 * 1_024_000 * 500, 8 * 2 * 1_024_000 * 8)


@pytest.mark.slow
def test_counts_are_of_stable_diffusion():
    found = scale.count()
    assert found.parameters == 83_653_863  # as published
    assert found.step_bf16 == pytest.approx(3 * found.forward, rel=0.01)  # a backward is two forwards
    per_image = 2 * 15.35e9 * (256 / 224) ** 2  # VGG-16: 15.3 GMAC of convolutions at 224
    assert 4 * per_image < found.step_float32 < 6 * per_image


@pytest.mark.slow
def test_checkpoints_are_as_large_as_counted(tmp_path):
    tiny = ModelConfig(block_out_channels=(32, 64), norm_num_groups=4)
    write, read = scale.checkpoint_rates(tmp_path, 1, tiny)
    assert write[0] > 0 < read[0]
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    vae, judge = tiny.build(3, (256, 256)), PatchDiscriminator(3)
    numbers = [sum(p.numel() for p in module.parameters()) for module in (vae, judge)]
    assert size == pytest.approx(4 * (4 * numbers[0] + 3 * numbers[1]), rel=0.02)


def test_files_to_measure_with_are_of_the_size_asked_for(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    scale.compress([Image.fromarray(pixels) for pixels in noise], tmp_path / "files", "jpg", 5000)
    sizes = [path.stat().st_size for path in (tmp_path / "files").iterdir()]
    assert len(sizes) == 3 and 4000 < sum(sizes) / 3 <= 5000


@pytest.mark.slow
def test_output_names_what_is_assumed(capsys):
    scale.main(["--gpus", "64", "--set", "shared_read=1e8"])
    text = capsys.readouterr().out
    assert "shared_read                        1e+08" in text.partition("ASSUMED")[2]
    assert text.count("saturated first: read") == 3
    with pytest.raises(SystemExit):
        scale.main(["--set", "shared_reed=1"])


STUBS = {
    # starts its command as the tasks of two nodes with a core each, passes signals on, and ends all when one fails
    "srun": """#!{python}
import os, signal, subprocess, sys
command = [argument for argument in sys.argv[1:] if argument != "--kill-on-bad-exit=1"]
cores = sorted(os.sched_getaffinity(0))
tasks = []
for node in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
    os.sched_setaffinity(0, {{cores[node % len(cores)]}})
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
    launch = f'[ "$1" = launch ] && exec {sys.executable} -m accelerate.commands.launch "${{@:2}}"'
    (folder / "accelerate").write_text(f"#!/bin/bash\n{launch}\n")
    (folder / "sitecustomize.py").write_text(WATCH)
    (folder / "accelerate").chmod(0o755)

    @contextmanager
    def started(output_dir, *flags, srun=folder):
        for number in range(os.getpid() % 10000, 10000):  # from which the script makes a port
            with socket.socket() as free, suppress(OSError):
                free.bind(("localhost", 20000 + number))
                break
        environment = {
            "PATH": f"{srun}:{folder}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "SLURM_JOB_ID": str(number),
            "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "local[0-1]", "PROCESSES_PER_NODE": "1",
            "NODE_DISK": str(output_dir) + "-disks", "REQUEUED": str(output_dir) + "-requeued",
            "PYTHONPATH": f"{folder}:{ROOT}", "WATCHED": str(output_dir), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        process = subprocess.Popen(
            ["bash", str(SLURM), *map(str, [*TINY, "--run.output_dir", output_dir, *flags])], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=os.environ | environment,
        )  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()  # which is passed on to all tasks
                process.communicate(timeout=60)

    return started


@pytest.fixture(scope="module")
def job(slurm, tmp_path_factory):
    """The folder of a run that SLURM stopped before its time was over; exit code and output of the job."""
    output_dir = tmp_path_factory.mktemp("job") / "run"
    with slurm(output_dir) as process:
        deadline = time.monotonic() + 240
        while not any((output_dir / "checkpoints").glob("images-*")):
            if time.monotonic() > deadline:
                process.terminate()
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
        output = process.communicate(timeout=240)[0]
    assert not (output_dir / "evaluation.json").exists()
    return output_dir, process.returncode, output


def train_as_a_node(output_dir):
    """Train as the job does; the files of the second process are readable by their owner alone, as in `slurm`."""
    os.umask((0o022, 0o077)[int(os.environ["RANK"])])
    train(settings_of(*TINY, "--run.output_dir", output_dir))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
class TestSlurm:
    def test_saved_before_its_time_is_over_and_queued_again(self, job):
        output_dir, code, output = job
        assert code == 75, output
        assert re.search("float32 on 2 x cpu.*, 30 images per forward", output), output
        assert "asked to stop (SIGUSR1)" in output and "saved as" in output
        assert len(Path(f"{output_dir}-requeued").read_text().split()) == 1

    def test_second_node_writes_only_its_own_part_of_checkpoints(self, job):
        first, second = ((Path(f"{job[0]}-disks") / node / "written").read_text().split() for node in "01")
        assert {Path(path).name for path in second} == {"process-00001.json"}
        assert {"metrics.jsonl", "manifest.json", ".lock", "ema.safetensors"} <= {Path(path).name for path in first}

    def test_continued_run_is_that_of_one_uninterrupted_job(self, job, tmp_path):
        """Bit by bit, with a thread a process in both; and the second process writes as little at the end of it."""
        output_dir = tmp_path / "run"
        shutil.copytree(job[0], output_dir)
        output = run_forked(train_as_a_node, output_dir, log=tmp_path / "log", processes=2)
        assert "continuing from" in output, output
        assert re.search("float32 on 2 x cpu.*, 30 images per forward", output), output
        assert (output_dir / "evaluation.json").exists()
        uninterrupted = tmp_path / "uninterrupted" / "run"
        run_forked(train_as_a_node, uninterrupted, log=tmp_path / "log", processes=2)
        expected, found = left_behind(uninterrupted), left_behind(output_dir)
        assert {name: found.get(name) for name in expected} == expected  # one more checkpoint, of the stop
        files = [path for path in output_dir.rglob("*") if path.is_file()]
        by_second = {str(path.relative_to(output_dir)) for path in files if not path.stat().st_mode & 0o044}
        checkpoints = [path.name for path in (output_dir / "checkpoints").iterdir()]
        assert len(checkpoints) >= 3 and len(files) > 20
        assert by_second == {f"checkpoints/{name}/process-00001.json" for name in checkpoints}

    @pytest.mark.parametrize("code", [0, 1])
    def test_job_that_ended_by_itself_is_not_queued_again(self, code, slurm, tmp_path):
        (tmp_path / "srun").write_text(f"#!/bin/bash\nexit {code}\n")
        (tmp_path / "srun").chmod(0o755)
        with slurm(tmp_path / "run", srun=tmp_path) as process:
            assert process.communicate(timeout=60)[0] == "" and process.returncode == code
        assert not (tmp_path / "run-requeued").exists()
