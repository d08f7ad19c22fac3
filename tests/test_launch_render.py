"""`vla-jax launch`: what it renders is held against the real schemas and linters, and what does not go together is refused."""

from __future__ import annotations

import copy
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jobset_schema import JOBSET

from vla_jax import cli, config, hardware, launch
from vla_jax.types import UserError

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
LINE = 'vla-jax train --config="$CONFIG" --workdir="$WORKDIR"'
GIVEN = {"data_root": "gs://b/a b", "image": "r/x:1", "project": "p", "zone": "z", "cluster": "c"}


def tool(name: str) -> str:
    """One of the extra `dev`."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not found:
        pytest.skip(f"{name} is not installed (extra `dev`)")
    return found


def rendered(kind: str, chips: str, **more) -> launch.Launch:
    options = launch.Options(config=f"configs/oxe_3b.py:size=3b,chips={chips}", **{"workdir": "gs://b/it's", **GIVEN, **more})
    return launch.render(kind, launch.Machines.of(chips), options)


def validate(jobset: dict) -> None:
    jsonschema, kubernetes = pytest.importorskip("jsonschema"), pytest.importorskip("kubernetes_validate")
    jsonschema.validate(jobset, JOBSET)
    for job in jobset["spec"]["replicatedJobs"]:
        body = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job["template"]}
        kubernetes.validate(body, kubernetes.latest_version(), strict=True)


@pytest.mark.parametrize("chips", ["v5e-16", "v5e-512", "v5p-128", "v6e-256", "tpu7x-64", None])
@pytest.mark.parametrize("spot", [False, True])
def test_jobsets_are_valid(chips, spot):
    """Every kind of TPU, one slice and several; and the file in launch/ as it is."""
    text = rendered("jobset", chips, spot=spot).files["jobset.yaml"] if chips else (LAUNCH / "jobset.yaml").read_text()
    jobset = yaml.safe_load(text)
    validate(jobset)
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    per_slice = spec["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert per_slice == math.prod(map(int, sides)) and spec["parallelism"] == spec["completions"]
    if chips:
        assert job["replicas"] * per_slice == int(chips.partition("-")[2])
        env = {e["name"]: e["value"] for e in container["env"]}
        assert (
            env["WORKDIR"] == "gs://b/it's" and env["VLA_DATA_ROOT"] == "gs://b/a b" and env["VLA_RESUMABLE_EXIT"] == str(launch.RESUMABLE)
        )
    assert LINE in container["args"][0]


def test_what_is_no_jobset_is_refused():
    """The schemas bite, in our part and in Kubernetes'."""
    good = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    validate(good)
    for change in (
        lambda j: j["spec"]["failurePolicy"]["rules"][0].pop("name"),
        lambda j: j["spec"]["failurePolicy"].__setitem__("restarts", 3),
        lambda j: j["spec"]["replicatedJobs"][0]["template"]["spec"].__setitem__("paralelism", 3),
        lambda j: j["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0].__setitem__("image", 3),
        lambda j: j["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"].__setitem__("containers", None),
    ):
        bad = copy.deepcopy(good)
        change(bad)
        with pytest.raises(Exception, match="required|unexpected|not of type|not allowed"):
            validate(bad)


@pytest.mark.parametrize(
    "chips, nodes, accelerators", [("v5e-64", 1, "tpu-v5litepod-64:1"), ("v6e-256", 1, "tpu-v6e-256:1"), ("h100-16", 2, "H100:8")]
)
def test_skypilot_starts_a_slice_once(chips, nodes, accelerators):
    """A node of its is a whole slice of TPUs, whose hosts start by themselves."""
    made = yaml.safe_load(rendered("skypilot", chips).files["skypilot.yaml"])
    assert (made["num_nodes"], made["resources"]["accelerators"]) == (nodes, accelerators)


def test_a_run_that_was_taken_away_is_told_from_a_mistake():
    """The patterns of the JobSet's rules against what Kubernetes says of a Job that a pod's exit code ended."""
    import re

    said = "Container train for pod default/vla-workers-0-3-abcde failed with exit code {} matching FailJob rule at index 0"
    rules = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["failurePolicy"]["rules"]
    action = lambda code: next(
        (r["action"] for r in rules if any(re.search(p, said.format(code)) for p in r["onJobFailureMessagePatterns"])), None
    )
    assert (action(2), action(75), action(1), action(134)) == ("FailJobSet", "RestartJobSetAndIgnoreMaxRestarts", None, None)


@pytest.mark.parametrize(
    "kind, chips",
    [("local", "cpu-4"), ("slurm", "h200-16"), ("tpu-vm", "v6e-64"), ("xpk", "v5e-512"), ("docker", "v5e-64"), ("skypilot", "h100-16")],
)
def test_scripts_pass_shellcheck(kind, chips, tmp_path):
    made = rendered(kind, chips)
    script = tmp_path / "run.sh"
    script.write_text(f"#!/usr/bin/env bash\nset -eu\n{made}\n")
    subprocess.run([tool("shellcheck"), str(script)], check=True)
    for text in made.files.values():
        body = yaml.safe_load(text)
        for part in ("setup", "run"):
            script.write_text(f"#!/usr/bin/env bash\n{body[part]}")
            subprocess.run([tool("shellcheck"), "-e", "SC1091", str(script)], check=True)


def test_files_of_launch_pass_their_linters():
    scripts = [str(p) for p in (*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", LAUNCH.parent / ".ci" / "run")]
    subprocess.run([tool("shellcheck"), *scripts], check=True)
    subprocess.run([tool("hadolint"), str(LAUNCH / "Dockerfile")], check=True)


def test_slurm_reaches_srun(tmp_path):
    """The rendered lines, with stand-ins for sbatch, which runs the script as Slurm would, and for srun."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, body in {
        "sbatch": 'while [ "${1#--}" != "$1" ]; do echo "$1"; shift; done; SLURM_JOB_ID=1 SLURM_SUBMIT_DIR=/x exec bash "$1"',
        "srun": 'shift; "$@"',
        "vla-jax": 'printf "<%s>" "$@"; echo; echo "root $VLA_DATA_ROOT"',
    }.items():
        (bin_ / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (bin_ / name).chmod(0o755)
    made = rendered("slurm", "h200-32", partition="big one", workdir="/w/it's")
    env = {"PATH": f"{bin_}:{os.environ['PATH']}", "VLA_VENV": str(tmp_path)}
    out = subprocess.run(
        ["bash", "-ec", str(made)], cwd=LAUNCH.parent, env=env, capture_output=True, text=True, check=True, timeout=30
    ).stdout
    assert "--nodes=4\n--gpus-per-node=8\n--partition=big one\n" in out
    assert "<train><--config=configs/oxe_3b.py:size=3b,chips=h200-32><--workdir=/w/it's>\nroot gs://b/a b\n" in out


@pytest.mark.parametrize(
    "text, topology, expected",
    [
        ("v5e-1", "", (1, 1, "1x1", 1)),
        ("v5e-64", "", (1, 16, "8x8", 64)),
        ("v5e-1024", "", (4, 256, "16x16", 1024)),
        ("v5p-4", "", (1, 1, "2x2x1", 4)),
        ("v5p-8", "", (1, 2, "2x2x2", 8)),
        ("v5p-32", "", (1, 8, "2x4x4", 32)),
        ("v5p-192", "4x4x12", (1, 48, "4x4x12", 192)),
        ("v6e-128", "", (1, 32, "8x16", 128)),
        ("v6e-32", "2x4", (4, 8, "2x4", 32)),
        ("tpu7x-64", "", (1, 16, "4x4x4", 128)),
        ("h200-4", "", (1, 1, "", 4)),
        ("h200-32", "", (1, 4, "", 32)),
        ("cpu-4", "", (1, 2, "", 4)),
    ],
)
def test_machines(text, topology, expected):
    m = launch.Machines.of(text, topology)
    assert (m.slices, m.hosts, m.topology, m.devices) == expected
    assert m.hosts * m.per_host == m.chips
    if m.tpu:
        assert hardware.topology(f"{m.kind}:{m.topology}")[0].name == m.kind


@pytest.mark.parametrize(
    "text, topology, says",
    [
        ("v5e", "", "KIND-NUMBER"),
        ("v9-4", "", "kinds: "),
        ("v5e-300", "", "several slices"),
        ("v5e-48", "", "no usual topology"),
        ("v5p-64", "8x8", "3 dimensions"),
        ("v5e-64", "4x8x2", "2 dimensions"),
        ("v5e-64", "8x16", "no multiple"),
        ("h200-12", "", "hosts have 8 chips"),
        ("h200-16", "4x4", "has none"),
    ],
)
def test_machines_that_are_not(text, topology, says):
    with pytest.raises(UserError, match=says):
        launch.Machines.of(text, topology)


@pytest.mark.parametrize(
    "over, chips, says",
    [
        (("mesh.data=4",), "v5e-64", "but there are 64 devices"),
        (("mesh.fsdp=32", "mesh.data=1"), "v5e-64", "but there are 64 devices"),
        (("mesh.data=1", "mesh.fsdp=1024"), "v5e-1024", "mesh.data is 1, and the 1024 devices are 4 slices"),
        (("pack.rows=100",), "v5e-64", "pack.rows = 100 is not divisible"),
        (("pack.rows=64", "pack.group=8"), "v5e-64", "in groups of 8 cannot be shared by 16 processes"),
    ],
)
def test_a_config_that_does_not_go_with_its_machines(over, chips, says):
    c = config.load(f"configs/oxe_3b.py:size=3b,chips={chips}", over)[0]
    with pytest.raises(UserError, match=says):
        launch.check(c, launch.Machines.of(chips), where="x")


@pytest.mark.parametrize("size", ["300m", "1b", "3b"])
@pytest.mark.parametrize("chips", ["v5e-16", "v5e-64", "v5e-1024", "v5p-128", "v6e-512", "tpu7x-64", "h200-16"])
def test_the_dial_goes_with_its_machines(size, chips):
    c = config.load(f"configs/oxe_3b.py:size={size},chips={chips}", ())[0]
    launch.check(c, launch.Machines.of(chips), where="x")


def test_the_command(capsys, tmp_path, monkeypatch):
    spec = "--config=configs/oxe_3b.py:size=3b,chips=v5e-64"
    line = ["launch", "jobset", spec, "--workdir=gs://b/r"]
    assert cli.main([*line, "--image=i", "--dry-run"]) == 0
    assert "gke-tpu-topology: 8x8" in capsys.readouterr().out
    for argv, says in (
        ([*line, "--dry-run"], "launch jobset needs --image"),
        ([*line, "--image=i", "--config.train.lr=1.0", "--dry-run"], "config file of your own"),
        ([*line, "--image=i", "--chips=v5e-128", "--dry-run"], "but there are 128 devices"),
        ([*line, "--image=i", "--name=A_b", "--dry-run"], "small letters"),
        (["launch", "slurm", spec, "--workdir=/r", "--dry-run"], "is for GPUs"),
        (
            ["launch", "tpu-vm", "--config=configs/oxe_3b.py:size=3b,chips=v5e-512", "--workdir=gs://b/r", "--project=p", "--zone=z"],
            "makes one slice",
        ),
        (["launch", "local", spec, "--workdir=/r", "--dry-run"], "simulated devices"),
        (["launch", "local", "--config=configs/demo.py", "--workdir=/r", "--dry-run"], "say the machines"),
        ([*line, "--image=i"], "kubectl is not here"),
    ):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert cli.main(argv) == 2
        assert says in capsys.readouterr().err


def test_it_is_really_started(tmp_path, monkeypatch, capfd):
    """Without --dry-run, with a stand-in for the program."""
    (tmp_path / "kubectl").write_text('#!/bin/sh\ncat "$3"; exit 7\n')
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    made = rendered("jobset", "v5e-64")
    assert launch.run(made) == 7 and "kind: JobSet" in capfd.readouterr().out


CHIPS = {
    "local": "cpu-4",
    "slurm": "h200-16",
    "tpu-vm": "v5e-64",
    "jobset": "v5e-64",
    "xpk": "v5e-64",
    "skypilot": "h200-16",
    "docker": "v5e-64",
}
CLOUD = ("tpu-vm", "jobset", "xpk", "skypilot")


@pytest.mark.parametrize("kind", launch.KINDS)
@pytest.mark.parametrize("workdir", ["", " ", "s3://b/x", "file:///x", "gs://", "gs://b", "gs://b/", "gs:///x"])
def test_a_workdir_that_training_would_not_take_is_refused(kind, workdir):
    with pytest.raises(UserError, match="is empty" if not workdir.strip() else "a run is kept in"):
        rendered(kind, CHIPS[kind], workdir=workdir, mounted=True)


@pytest.mark.parametrize(
    "kind, workdir, mounted, says",
    [
        *((kind, "gs://b/runs/a", False, "") for kind in launch.KINDS),
        *((kind, workdir, False, "the machines' own disks") for kind in CLOUD for workdir in ("runs/a", "/mnt/b/a", "~/a", "gs:/b/a")),
        *((kind, "runs/a", True, "the machines' own disks") for kind in CLOUD),
        *((kind, "/mnt/b/a", True, "") for kind in CLOUD),
        ("slurm", "/shared/a", False, ""),
        ("slurm", "runs/a", False, "an absolute path on storage that every node sees"),
        ("slurm", "runs/a", True, "an absolute path on storage that every node sees"),
        ("local", "runs/a", False, ""),
        ("docker", "/x", False, ""),
    ],
)
def test_a_run_is_not_kept_on_a_disk_that_goes_away(kind, workdir, mounted, says):
    if says:
        with pytest.raises(UserError, match=says):
            rendered(kind, CHIPS[kind], workdir=workdir, mounted=mounted)
    else:
        made = rendered(kind, CHIPS[kind], workdir=workdir, mounted=mounted)
        assert kind == "docker" or workdir in str(made)


def test_the_workdir_of_the_command(capsys):
    line = ["launch", "jobset", "--config=configs/oxe_3b.py:size=3b,chips=v5e-64", "--image=i", "--dry-run"]
    assert cli.main([*line, "--workdir=runs/a"]) == 2 and "--mounted" in capsys.readouterr().err
    assert cli.main([*line, "--workdir="]) == 2 and "is empty" in capsys.readouterr().err
    assert cli.main([*line, "--workdir=/m/a", "--mounted"]) == 0 and "value: /m/a" in capsys.readouterr().out


@pytest.mark.parametrize(
    "image, good",
    [
        ("vla-jax", True),
        ("europe-west4-docker.pkg.dev/my-project/repo/vla-jax:v1.2_3", True),
        ("localhost:5000/a/b__c:latest", True),
        ("ghcr.io/o/x@sha256:" + "0a" * 32, True),
        ("ghcr.io/o/x:1@sha256:" + "0a" * 32, True),
        ("REGION-docker.pkg.dev/PROJECT/REPOSITORY/vla-jax:TAG", False),
        ("a b", False),
        ("x:", False),
        ("x:a:b", False),
        ("https://ghcr.io/o/x", False),
        ("/x", False),
        ("x/", False),
        ("--force", False),
        ("x\n", False),
        ("x@sha256:12", False),
    ],
)
def test_images(image, good):
    if good:
        assert image in str(rendered("jobset", "v5e-64", image=image))
    else:
        with pytest.raises(UserError, match="names no image"):
            rendered("jobset", "v5e-64", image=image)


def test_restarts_are_not_negative():
    with pytest.raises(UserError, match="--restarts=-1"):
        rendered("jobset", "v5e-64", restarts=-1)
    assert "maxRestarts: 0" in rendered("jobset", "v5e-64", restarts=0).files["jobset.yaml"]


@pytest.mark.parametrize("there", ["a template", "of the user's", "empty", "a folder", "a link to nowhere"])
def test_files_of_others_are_not_written_over(tmp_path, monkeypatch, there):
    (tmp_path / "kubectl").write_text("#!/bin/sh\ntouch called\n")
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "jobset.yaml"
    texts = {"a template": (LAUNCH / "jobset.yaml").read_text(), "of the user's": "kind: JobSet\n", "empty": ""}
    if there in texts:
        file.write_text(texts[there])
    elif there == "a folder":
        file.mkdir()
    else:
        file.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="jobset.yaml is there, and launch did not write it"):
        launch.run(rendered("jobset", "v5e-64"))
    assert not (tmp_path / "called").exists() and not (tmp_path / "nowhere").exists()
    assert there not in texts or file.read_text() == texts[there]


def test_files_of_ours_are_written_over(tmp_path, monkeypatch):
    for name in ("kubectl", "sky"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    for kind, chips in (("jobset", "v5e-64"), ("skypilot", "h200-16")):
        assert launch.run(rendered(kind, chips, name="one")) == 0 and launch.run(rendered(kind, chips, name="two")) == 0
        first, *rest = (tmp_path / f"{kind}.yaml").read_text().splitlines()
        assert first.startswith("# rendered by vla-jax launch") and "two" in "".join(rest) and "name: one" not in "".join(rest)
