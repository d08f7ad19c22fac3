"""The launchers, with stand-ins for the programs that they start."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
LINE = 'vla-jax train --config="$CONFIG" --workdir="$WORKDIR"'
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"]
LAUNCHERS = ["local.sh", "slurm.sbatch", "tpu_vm.sh", "jobset.yaml", "xpk.sh", "skypilot.yaml", "Dockerfile", "README.md"]


@pytest.fixture
def stub(tmp_path):
    """stub(name, script): an executable of that name, first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(name: str, script: str) -> None:
        (folder / name).write_text("#!/usr/bin/env bash\n" + script)
        (folder / name).chmod(0o755)

    make.env = dict(os.environ) | {"PATH": f"{folder}:{os.environ['PATH']}", "CONFIG": "c d.py", "WORKDIR": "/w"}
    for name in ("VLA_NUM_PROCESSES", "JAX_NUM_CPU_DEVICES", "SLURM_RESTART_COUNT"):
        make.env.pop(name, None)
    return make


def call(stub, *command: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *command], env=stub.env | env, text=True, capture_output=True, timeout=30)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse_and_are_executable(path):
    shell = "sh" if path.read_text().startswith("#!/bin/sh") else "bash"
    subprocess.run([shell, "-n", str(path)], check=True)
    assert os.access(path, os.X_OK) or path.suffix == ".sbatch"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_ends_in_the_same_line(name):
    text = (LAUNCH / name).read_text().replace('\\"', '"')
    # local.sh takes any command of vla-jax, so the line stands in its usage.
    assert LINE in text


def test_local_passes_variables_arguments_and_the_worst_exit_code(stub):
    stub(
        "vla-jax",
        """
printf '%s/%s %s %s <%s>\\n' "$VLA_PROCESS_ID" "$VLA_NUM_PROCESSES" "$VLA_COORDINATOR" "$JAX_NUM_CPU_DEVICES" "$3"
exit $((VLA_PROCESS_ID * 3))""",
    )
    done = call(stub, str(LAUNCH / "local.sh"), "-n", "2", "-d", "4", "--", "train", "--x", "a b")
    assert done.returncode == 3, done
    lines = sorted(done.stdout.splitlines())
    assert [line.split(" localhost:")[0] for line in lines] == ["[0] 0/2", "[1] 1/2"]
    assert all(line.endswith(" 4 <a b>") for line in lines)
    assert len({line.split()[2] for line in lines}) == 1  # one coordinator


def test_local_stops_the_others_when_one_fails(stub):
    stub(
        "vla-jax",
        """[ "$VLA_PROCESS_ID" = 1 ] && exit 5
trap 'echo saved; exit 0' TERM
while :; do sleep 0.1; done""",
    )
    start = time.monotonic()
    done = call(stub, str(LAUNCH / "local.sh"), "-n", "2", "--", "train")
    assert done.returncode == 5 and "[0] saved" in done.stdout, done
    assert time.monotonic() - start < 10


def test_local_forwards_sigterm_and_kills_what_does_not_end(stub):
    stub(
        "vla-jax",
        """[ "$VLA_PROCESS_ID" = 1 ] && trap '' TERM || trap 'echo saved; exit 0' TERM
echo up
while :; do sleep 0.1; done""",
    )
    with subprocess.Popen(
        ["bash", str(LAUNCH / "local.sh"), "-n", "2", "--", "train"],
        text=True,
        env=stub.env | {"VLA_KILL_AFTER_S": "1"},
        stdout=subprocess.PIPE,
    ) as child:
        for _ in range(2):
            assert child.stdout.readline().rstrip().endswith("up")
        child.send_signal(signal.SIGTERM)
        out, _ = child.communicate(timeout=20)
    assert child.returncode == 143 and "[0] saved" in out


@pytest.mark.parametrize("code, starts", [(1, 3), (2, 1), (0, 1)])
def test_local_restarts_what_a_restart_can_help(stub, tmp_path, code, starts):
    stub("vla-jax", f"echo up; exit {code}")
    done = call(stub, str(LAUNCH / "local.sh"), "-n", "1", "--restarts", "2", "--", "train")
    assert done.returncode == code and done.stdout.count("[0] up") == starts


@pytest.mark.parametrize(
    "script",
    [
        "sleep 0.$((VLA_PROCESS_ID * 5)); exit $((VLA_PROCESS_ID ? 134 : 2))",
        "sleep 0.$((VLA_PROCESS_ID * 5)); exit $((VLA_PROCESS_ID ? 2 : 134))",
        '[ "$VLA_PROCESS_ID" = 0 ] && exit 134; trap "exit 2" TERM; while :; do sleep 0.1; done',
    ],
)
def test_local_keeps_an_error_of_the_users_whatever_becomes_of_its_peers(stub, script):
    """Before, beside and after the abort of another, even where only its being stopped brings it out; and does not start again."""
    stub("vla-jax", f"echo up; {script}")
    done = call(stub, str(LAUNCH / "local.sh"), "-n", "2", "--restarts", "2", "--", "train")
    assert done.returncode == 2 and done.stdout.count("up") == 2 and "restart" not in done.stderr, done


@pytest.mark.parametrize("arguments", [["--", "train"], ["-n", "2"], ["-n", "two", "--", "train"], ["-n"], ["train"]])
def test_local_refuses_with_2(stub, arguments):
    done = call(stub, str(LAUNCH / "local.sh"), *arguments)
    assert done.returncode == 2 and done.stderr.startswith("local.sh: ")


@pytest.mark.parametrize("code, queued", [(0, False), (2, False), (1, True), (134, True), (75, True)])
def test_slurm_queues_again_what_a_restart_can_help(stub, code, queued):
    stub("vla-jax", f'echo "$@"; exit {code}')
    stub("srun", 'while [[ "$1" == --* ]]; do shift; done; exec "$@"')
    stub("scontrol", 'echo "scontrol $*"')
    slurm = {"SLURM_SUBMIT_DIR": "/nowhere", "SLURM_JOB_ID": "77"}
    done = call(stub, str(LAUNCH / "slurm.sbatch"), **slurm)
    assert "train --config=c d.py --workdir=/w" in done.stdout
    assert ("scontrol requeue 77" in done.stdout) == queued
    assert done.returncode == (0 if queued else code)  # a requeued job ends well
    done = call(stub, str(LAUNCH / "slurm.sbatch"), **slurm, SLURM_RESTART_COUNT="100")
    assert done.returncode == code and "scontrol requeue" not in done.stdout


@contextlib.contextmanager
def slurm_job(stub, folder):
    """The script with a run that saves on SIGTERM; srun answers that signal as Slurm's does, by killing its tasks; scancel signals them alone."""
    stub("vla-jax", "trap 'sleep 0.5; echo saved; exit 75' TERM; echo up; while :; do sleep 0.1; done")
    stub(
        "srun",
        f"""while [[ "$1" == --* ]]; do shift; done
"$@" & task=$!
trap 'pkill -KILL -P $task; kill -KILL $task; exit 137' TERM
until pgrep -P $task -f vla-jax >{folder}/task; do sleep 0.02; done
wait $task""",
    )
    stub("scancel", f"[ \"$*\" = '--signal=TERM 77' ] && kill -TERM $(cat {folder}/task)")
    stub("scontrol", 'echo "scontrol $*"')
    env = stub.env | {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "77"}
    with subprocess.Popen(["bash", str(LAUNCH / "slurm.sbatch")], text=True, stdout=subprocess.PIPE, env=env) as child:
        assert child.stdout.readline() == "up\n"
        time.sleep(0.2)
        yield child


def test_slurm_saves_and_queues_again_before_the_time_limit(stub, tmp_path):
    with slurm_job(stub, tmp_path) as child:
        child.send_signal(signal.SIGUSR1)
        out, _ = child.communicate(timeout=20)
    assert child.returncode == 0 and out.index("saved") < out.index("scontrol requeue 77")


def test_slurm_saves_and_ends(stub, tmp_path):
    with slurm_job(stub, tmp_path) as child:
        child.send_signal(signal.SIGUSR2)
        out, _ = child.communicate(timeout=20)
    assert child.returncode == 75 and "saved" in out and "scontrol" not in out


def test_slurm_does_not_have_its_tasks_killed(stub, tmp_path):
    """Slurm ends a job: it signals the tasks itself, and this script must not turn to srun."""
    with slurm_job(stub, tmp_path) as child:
        child.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        os.kill(int((tmp_path / "task").read_text()), signal.SIGTERM)
        out, _ = child.communicate(timeout=20)
    assert child.returncode == 143 and "saved" in out and "scontrol" not in out


@pytest.mark.parametrize("code", [134, 137])
def test_slurm_does_not_queue_again_what_one_task_refused(stub, tmp_path, code):
    """srun gives the code of a task that was killed before that of one that ended by itself."""
    stub("vla-jax", "exit 2")
    stub("srun", f'while [[ "$1" == --* ]]; do shift; done; "$@"; exit {code}')
    stub("scontrol", 'echo "scontrol $*"')
    done = call(stub, str(LAUNCH / "slurm.sbatch"), SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="77")
    assert done.returncode == 2 and "scontrol" not in done.stdout and not list(tmp_path.glob(".vla*"))


def test_xpk_leaves_the_line_to_the_pods_shell(stub):
    stub("xpk", 'printf "%s\\n" "$@"')
    names = dict.fromkeys(["CLUSTER", "PROJECT", "ZONE", "IMAGE"], "x")
    out = call(stub, str(LAUNCH / "xpk.sh"), "--spot", **names).stdout.splitlines()
    assert f"--command=. launch/xla_flags.sh && {LINE}" in out and "CONFIG=c d.py" in out and out[-1] == "--spot"


def test_xpk_restarts_by_exit_code(stub):
    """What launch/README.md says of exit codes: 0 and 2 are final, all others of ours go on. xpk itself adds 42 and 127 to 255."""
    stub("xpk", 'printf "%s\\n" "$@"')
    out = call(stub, str(LAUNCH / "xpk.sh"), **dict.fromkeys(["CLUSTER", "PROJECT", "ZONE", "IMAGE"], "x")).stdout.splitlines()
    (codes,) = [line.partition("=")[2] for line in out if line.startswith("--restart-on")]
    assert {1, 75, 124} <= set(map(int, codes.split(","))) <= {1, 75, 124, 134, 137, 143}
    assert f"--restart-on-exit-codes={codes}" in out


# A gcloud whose answers to `describe` are the lines of a file, one a call; "none": there is no resource.
FAKE_GCLOUD = """
echo "$4" >>{folder}/calls
case "$4" in
describe)
    state="$(head -n 1 {folder}/states)"; sed -i 1d {folder}/states
    [ -n "$state" ] && [ "$state" != none ] || {{ echo 'NOT_FOUND' >&2; exit 1; }}
    echo "$state" ;;
create) [ ! -e {folder}/there ] || {{ echo ALREADY_EXISTS >&2; exit 1; }}; touch {folder}/there; echo "$*" >{folder}/created ;;
delete) rm {folder}/there ;;
esac
"""


@pytest.mark.parametrize(
    "states, calls, code",
    [
        ("none ACCEPTED WAITING_FOR_RESOURCES ACTIVE", "describe create describe describe describe", 0),
        ("ACTIVE", "describe", 0),
        ("PROVISIONING ACTIVE", "describe describe", 0),
        ("SUSPENDED ACCEPTED ACTIVE", "describe delete create describe describe", 0),
        ("FAILED ACTIVE", "describe delete create describe", 0),
        ("SUSPENDING SUSPENDED ACTIVE", "describe describe delete create describe", 0),
        ("DELETING none ACTIVE", "describe describe create describe", 0),
        ("none ACCEPTED none ACTIVE", "describe create describe describe describe", 0),  # one answer that did not come
        ("none FAILED", "describe create describe", 1),
        ("none ACCEPTED", "describe create describe" + " describe" * 10, 1),  # deleted by another, or no login any more
        ("SUSPENDED ACCEPTED FAILED", "describe delete create describe describe", 1),
    ],
)
def test_tpu_vm_requests_a_slice_that_is_not_there(stub, tmp_path, states, calls, code):
    stub("gcloud", FAKE_GCLOUD.format(folder=tmp_path))
    stub("sleep", "true")
    (tmp_path / "states").write_text("".join(f"{s}\n" for s in states.split()))
    if not states.startswith(("none", "DELETING")):
        (tmp_path / "there").touch()
    done = call(stub, str(LAUNCH / "tpu_vm.sh"), "create", PROJECT="p", ZONE="z", NAME="n", SPOT="1", TPU_TYPE="v6e-8")
    assert done.returncode == code and (tmp_path / "calls").read_text().split() == calls.split(), done
    if "create" in calls:
        assert "create n --project=p --zone=z --node-id=n --accelerator-type=v6e-8" in (tmp_path / "created").read_text()


def test_tpu_vm_says_why_a_slice_cannot_be_requested(stub, tmp_path):
    """Nothing can be described, as without a login: `create` fails, and its message is shown."""
    stub("gcloud", 'echo "please log in to $4" >&2; exit 1')
    done = call(stub, str(LAUNCH / "tpu_vm.sh"), "create", PROJECT="p", ZONE="z", NAME="n")
    assert done.returncode == 1 and done.stderr == "please log in to create\n"


def test_what_is_installed_can_keep_a_run_at_gs():
    for name, count in (("Dockerfile", 1), ("tpu_vm.sh", 1), ("skypilot.yaml", 1), ("README.md", 1)):
        found = re.findall(r"-e [\"']\.\[(.*?)\][\"']", (LAUNCH / name).read_text())
        assert len(found) == count and all("gcs" in extras.split(",") for extras in found), (name, found)
    for name in ("Dockerfile", "tpu_vm.sh", "xpk.sh", "jobset.yaml", "skypilot.yaml"):
        text = (LAUNCH / name).read_text()
        assert "gs://BUCKET/runs/a" in text and "/mnt/" not in text, name


def test_tpu_vm_runs_the_line_on_the_workers(stub, tmp_path):
    # The stand-in for gcloud runs the remote command here, as one worker would.
    (tmp_path / "vla_jax").mkdir()
    (tmp_path / "vla_jax" / "launch").symlink_to(LAUNCH)
    stub("gcloud", f'cd {tmp_path}; for last; do :; done; exec bash -c "${{last#--command=}}"')
    stub("vla-jax", 'echo "$VLA_COORDINATOR: $*"')
    done = call(stub, str(LAUNCH / "tpu_vm.sh"), "run", PROJECT="p", ZONE="z", NAME="n")
    assert done.stdout == "auto: train --config=c d.py --workdir=/w\n", done
    assert (tmp_path / "vla_jax" / "run.pid").read_text().strip().isdigit()


def flags(stub, **env: str) -> dict[str, str]:
    command = '. launch/xla_flags.sh; echo "$LIBTPU_INIT_ARGS"; echo "$XLA_FLAGS"'
    done = subprocess.run(
        ["bash", "-c", command], env=stub.env | {"XLA_FLAGS": ""} | env, text=True, capture_output=True, cwd=ROOT, check=True
    )
    return dict(zip(("tpu", "gpu"), done.stdout.split("\n")))


def test_flags_leave_the_last_word_to_the_user(stub):
    mine = flags(stub, LIBTPU_INIT_ARGS="--mine=1", XLA_FLAGS="--also=2")
    assert mine["tpu"].startswith("--xla_tpu_enable_async") and mine["tpu"].endswith(" --mine=1") and mine["gpu"] == "--also=2"
    stub("nvidia-smi", "true")
    assert flags(stub, XLA_FLAGS="--also=2")["gpu"] == "--xla_gpu_enable_latency_hiding_scheduler=true --also=2"
    assert flags(stub, VLA_NO_XLA_FLAGS="1", LIBTPU_INIT_ARGS="--mine=1") == {"tpu": "--mine=1", "gpu": ""}


@pytest.mark.slow
def test_the_tpu_compiler_knows_the_flags(stub):
    """And refuses those that it does not know: a compile in a process of its own, since flags are read once."""
    pytest.importorskip("libtpu", reason="the extra `tpu` is not installed")
    program = """
from vla_jax.train.compile_check import devices
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
mesh = Mesh(np.array(devices("v5e:2x2", 1)), ("fsdp",))
x = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
jax.jit(lambda x: x @ x).lower(x).compile()
print("compiled")
"""
    env = stub.env | {"JAX_PLATFORMS": "cpu"}
    run = lambda **more: subprocess.run(
        [sys.executable, "-c", program], env=env | more, text=True, capture_output=True, timeout=200, cwd=ROOT
    )
    assert "compiled" in run(LIBTPU_INIT_ARGS=flags(stub)["tpu"]).stdout
    refused = run(LIBTPU_INIT_ARGS="--xla_tpu_no_such_flag=true")
    assert "compiled" not in refused.stdout and "xla_tpu_no_such_flag" in refused.stderr


# A Python for launch/setup.sh: it makes a .venv whose python notes each call of pip install.
FAKE_PYTHON = """
case "$*" in
*version_info*3,\\ 11*) exit {old} ;;
*print*) echo 3.{minor} ;;
*ensurepip*) exit {no_venv} ;;
"-m venv .venv") mkdir -p .venv/bin; cat >.venv/bin/python <<'EOF'
#!/bin/sh
case "$*" in *"pip install"*) echo installed >>.venv/calls; test ! -e broken ;; esac
EOF
chmod +x .venv/bin/python ;;
esac"""


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    (folder / "launch").mkdir(parents=True)
    (folder / "launch" / "setup.sh").write_text((LAUNCH / "setup.sh").read_text())
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).write_text("x")
    return folder


def setup(stub, project, **fields) -> subprocess.CompletedProcess:
    for name in ("python3.12", "python3.11", "python3"):
        stub(name, FAKE_PYTHON.format(**({"old": 0, "minor": 12, "no_venv": 0} | fields)))
    return call(stub, str(project / "launch" / "setup.sh"), PYTHON="")


def test_setup_happens_once_and_again_after_a_change_or_an_interruption(stub, project):
    def calls() -> int:
        done = setup(stub, project)
        assert done.returncode == 0, done
        return len((project / ".venv" / "calls").read_text().split())

    assert [calls(), calls()] == [1, 1]
    (project / "constraints.txt").write_text("y")
    assert [calls(), calls()] == [2, 2]  # the same .venv, updated
    (project / "broken").touch()
    (project / "constraints.txt").write_text("z")
    failed = setup(stub, project)
    assert failed.returncode == 1 and "pip install failed on Python" in failed.stderr
    (project / "broken").unlink()
    assert [calls(), calls()] == [1, 1]  # made anew


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"old": 1, "minor": 10}, "Python 3.11 or later is needed (found: python3.12 is 3.10"),
        ({"no_venv": 1}, "apt install python3.12-venv"),
    ],
)
def test_setup_says_what_is_missing(stub, project, fields, says):
    failed = setup(stub, project, **fields)
    assert failed.returncode == 1 and says in failed.stderr and len(failed.stderr.splitlines()) == 1
    assert not (project / ".venv").exists()


def test_setup_leaves_a_foreign_venv_alone(stub, project):
    (project / ".venv").mkdir()
    (project / ".venv" / "mine").touch()
    assert "was not made by" in setup(stub, project).stderr
    assert (project / ".venv" / "mine").exists()


def test_constraints_name_versions_only():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            requirement, _, marker = line.partition(" ; ")
            name, version = requirement.split("==")
            assert name == name.lower() and not {*"/@: "} & {*version}
            assert marker in ("", 'python_version < "3.12"', 'python_version >= "3.12"')
