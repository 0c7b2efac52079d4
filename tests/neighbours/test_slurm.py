"""Slurm: `slurm.sbatch` on two nodes, which are two daemons on this machine, is signaled, requeued and resumed.

Needs root and the Debian packages slurmctld, slurmd, slurm-client and munge.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.training.conftest import SMALL, rows

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
missing = [name for name in PROGRAMS if shutil.which(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
    pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="daemons of Slurm are started as root"),
]
SCRIPT = ROOT / "minigpt_hf" / "launch" / "slurm.sbatch"

# Both nodes are this machine, with two GPUs that do not exist: Slurm only counts them. The name of the first one, where the
# rendezvous takes place, must resolve.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 RealMemory=8000 Gres=gpu:2
NodeName={host}-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 RealMemory=8000 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A cluster of two nodes; `SLURM_CONF` refers to it."""
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().partition(".")[0]
    for path in [folder, *folder.parents]:  # munged requires that others can reach its socket
        if path.is_relative_to(Path(os.environ.get("TMPDIR", "/tmp"))) and path != Path("/tmp"):
            path.chmod(0o755)
    (folder / "state").mkdir()
    for gpu in ("gpu0", "gpu1"):
        (folder / gpu).touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(folder=folder, host=host, ports=free_ports(3)))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    names = (
        "key-file=munge.key",
        "socket=munge.socket",
        "pid-file=munged.pid",
        "log-file=munged.log",
        "seed-file=seed",
    )
    munged = ["munged", "--force", "--foreground", *(f"--{name.replace('=', f'={folder}/')}" for name in names)]
    daemons = [munged, ["slurmctld", "-D", "-f", configuration]]
    daemons += [["slurmd", "-D", "-N", node, "-f", configuration] for node in (host, f"{host}-2")]
    running = []
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(configuration)
    try:
        for argv in daemons:
            with (folder / f"{argv[0]}-{len(running)}.output").open("w") as output:
                running.append(subprocess.Popen(list(map(str, argv)), stdout=output, stderr=subprocess.STDOUT))
            time.sleep(1)
        deadline = time.monotonic() + 60
        while subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout != "idle\n":
            assert time.monotonic() < deadline, "\n".join(each.read_text()[-1000:] for each in folder.glob("*.output"))
            time.sleep(1)
        yield folder
        deadline = time.monotonic() + 60
        while slurm_says("squeue", "-h"):  # the daemons end no processes of a running job
            assert time.monotonic() < deadline, slurm_says("squeue")
            time.sleep(1)
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(timeout=30)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


def slurm_says(*argv) -> str:
    return subprocess.run(list(map(str, argv)), capture_output=True, text=True, check=True).stdout.strip()


def wait_until(condition, output: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        said = output.read_text() if output.exists() else ""
        assert time.monotonic() < deadline, f"{said}\n{slurm_says('squeue')}"
        time.sleep(0.2)


def test_slurm_accepts_the_script(slurm):
    argv = ["sbatch", "--test-only", "--gpus-per-node", "2", SCRIPT, "--recipe", "demo"]
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "using 128 processors on nodes" in done.stderr


def test_a_signaled_job_is_requeued_and_resumes_exactly(slurm, text_file, tmp_path):
    """SIGUSR1 to the script, as `--signal=B:USR1@120` sends it; afterwards the run equals an uninterrupted one."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SMALL.replace("max_steps: 8", "max_steps: 400").replace("save_steps: 2", "save_steps: 400"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    run, output = tmp_path / "run", tmp_path / "output"

    def submit(folder: Path) -> str:
        argv = [
            "sbatch",
            "--parsable",
            "--gpus-per-node",
            "1",
            "--cpus-per-task",
            "1",
            "--mem",
            "100",
            "--output",
            output,
        ]
        argv += [SCRIPT, "--recipe", recipe, "--data", text_file, "--output_dir", folder]
        done = subprocess.run(list(map(str, argv)), env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    job = submit(run)
    wait_until(lambda: (run / "log.jsonl").exists() and len(rows(run)) > 3, output)
    slurm_says("scancel", "--signal=USR1", "--batch", job)
    wait_until(lambda: "stopped by SIGUSR1 and saved at step" in output.read_text(), output)
    stopped_at = int(re.search(r"SIGUSR1 and saved at step (\d+)", output.read_text())[1])
    assert 3 < stopped_at < 400
    wait_until(lambda: "Restarts=1" in slurm_says("scontrol", "show", "job", job), output)
    slurm_says("scontrol", "update", f"jobid={job}", "starttime=now")  # otherwise Slurm waits for two minutes
    wait_until(lambda: (run / "model").is_dir(), output)
    assert f"resuming from step {stopped_at}" in output.read_text()
    assert json.loads((run / "fingerprint.json").read_text())["world_size"] == 2

    submit(tmp_path / "straight")
    wait_until(lambda: (tmp_path / "straight" / "model").is_dir(), output)
    assert rows(run) == rows(tmp_path / "straight")
    for name in ("optimizer.pt", "model.safetensors"):
        files = [folder / "checkpoint-400" / name for folder in (run, tmp_path / "straight")]
        assert files[0].read_bytes() == files[1].read_bytes()
