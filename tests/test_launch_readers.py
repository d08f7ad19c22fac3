"""What `vla-jax launch` renders, read by the programs that it is for: SkyPilot, xpk's own parser, and the models that JobSet's API definition
generates (the Kubeflow Trainer has them). In the Python that launch/oracles.sh makes or VLA_LAUNCHERS_PYTHON names; skipped without."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from lively import other_python

from vla_jax import launch

LAUNCH = Path(__file__).resolve().parent.parent / "launch"


def rendered(kind: str, chips: str, **more) -> launch.Launch:
    given = {"workdir": "gs://b/it's", "data_root": "gs://b/a b", "image": "r/x:1", "project": "p", "zone": "z", "cluster": "c"}
    options = launch.Options(config=f"configs/oxe_3b.py:size=3b,chips={chips}", **{**given, **more})
    return launch.render(kind, launch.Machines.of(chips), options)


def read(kind: str, text: str, tmp_path) -> dict:
    python = other_python("launchers")
    if not python:
        pytest.skip("no SkyPilot, xpk and Kubeflow Trainer here: sh launch/oracles.sh, or VLA_LAUNCHERS_PYTHON")
    file = tmp_path / "given"
    file.write_text(text)
    command = [python, str(Path(__file__).with_name("launch_reads.py")), kind, str(file)]
    env = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_skypilot_reads_its_task(tmp_path):
    for text, nodes, accelerators, spot in (
        (rendered("skypilot", "h100-16", spot=True).files["skypilot.yaml"], 2, {"H100": 8}, True),
        (rendered("skypilot", "h200-64").files["skypilot.yaml"], 8, {"H200": 8}, False),
        (rendered("skypilot", "v5e-64").files["skypilot.yaml"], 1, {"tpu-v5litepod-64": 1}, False),
        ((LAUNCH / "skypilot.yaml").read_text(), 2, {"H200": 8}, True),
    ):
        found = read("skypilot", text, tmp_path)
        assert (found["nodes"], found["accelerators"], found["spot"]) == (nodes, accelerators, spot), found
        assert found["recovery"]["max_restarts_on_errors"] == 100 and found["recovery"]["strategy"] == "FAILOVER"
        assert found["envs"]["CONFIG"].startswith("configs/oxe_3b.py:size=3b")
    bad = yaml.safe_load(text) | {"nodes": 3}
    assert "nodes" in read("skypilot", yaml.safe_dump(bad), tmp_path)["refused"]


@pytest.mark.parametrize("chips", ["v5e-64", "v5e-512", "v5p-128", None])
def test_jobsets_are_those_of_the_api(chips, tmp_path):
    """Nothing dropped, so every field is one of the API; what comes back besides is the default protocol of ports."""
    text = rendered("jobset", chips, spot=True).files["jobset.yaml"] if chips else (LAUNCH / "jobset.yaml").read_text()
    given = yaml.safe_load(text)
    (job,) = given["spec"]["replicatedJobs"]
    for port in job["template"]["spec"]["template"]["spec"]["containers"][0]["ports"]:
        port["protocol"] = "TCP"
    assert read("jobset", text, tmp_path) == given
    given["spec"]["failurePolicy"]["restarts"] = 3
    assert read("jobset", yaml.safe_dump(given), tmp_path) != given
    given["spec"]["failurePolicy"]["maxRestarts"] = "3"
    assert "maxRestarts" in read("jobset", yaml.safe_dump(given), tmp_path)["refused"]


def test_xpk_takes_its_arguments(tmp_path):
    """What launch/xpk.sh calls xpk with, when called with what is rendered."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "xpk").write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > {tmp_path}/argv\n")
    (tmp_path / "bin" / "xpk").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", str(rendered("xpk", "v5e-512", spot=True))], cwd=LAUNCH.parent, env=env, check=True, timeout=30)
    argv = (tmp_path / "argv").read_text().split("\0")[:-1]
    found = read("xpk", json.dumps(argv), tmp_path)
    assert (found["tpu_type"], found["num_slices"], found["docker_image"]) == ("v5litepod-256", 2, "r/x:1"), found
    assert (found["cluster"], found["project"], found["zone"], found["spot"]) == ("c", "p", "z", True)
    assert found["restart_on_exit_codes"].split(",")[:2] == ["1", str(launch.RESUMABLE)] and int(found["max_restarts"]) == 100
    assert {"WORKDIR=gs://b/it's", "VLA_DATA_ROOT=gs://b/a b", f"VLA_RESUMABLE_EXIT={launch.RESUMABLE}"} <= set(found["env"])
    assert "unrecognized arguments: --tpu-kind=x" in read("xpk", json.dumps([*argv, "--tpu-kind=x"]), tmp_path)["refused"]
