"""Two real processes of two devices each give the run that one process of four gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def test_two_processes_equal_one(tabletop, tmp_path):
    def argv(workdir):
        pairs = {
            "data.root": tabletop,
            "data.index_dir": tmp_path / "ix",
            "data.holdout": 0.2,
            "model.preset": "tiny",
            "pack.rows": 4,
            "pack.group": 2,
            "train.steps": 3,
            "train.log_every": 1,
            "train.save_every": 2,
            "train.eval_batches": 1,
            "mesh.data": 2,
            "mesh.fsdp": 2,
        }
        return ["train", "--config=configs/demo.py", *(f"--config.{k}={v}" for k, v in pairs.items()), f"--workdir={workdir}"]

    base = {k: v for k, v in os.environ.items() if not k.startswith("VLA_")} | {"JAX_PLATFORMS": "cpu"}
    one = subprocess.run(
        [sys.executable, "-m", "vla_jax.cli", *argv(tmp_path / "one")],
        env={**base, "JAX_NUM_CPU_DEVICES": "4"},
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert one.returncode == 0, one.stderr[-3000:]
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    program = bin_dir / "vla-jax"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m vla_jax.cli "$@"\n')
    program.chmod(0o755)
    two = subprocess.run(
        ["bash", str(REPO / "launch/local.sh"), "-n", "2", "-d", "2", "--", *argv(tmp_path / "two")],
        env={**base, "PATH": f"{bin_dir}:{base['PATH']}"},
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert two.returncode == 0, two.stdout[-3000:] + two.stderr[-3000:]
    read = lambda d: [json.loads(x) for x in (tmp_path / d / "metrics.jsonl").read_text().splitlines()]
    a, b = read("one"), read("two")
    assert [x["step"] for x in a] == [x["step"] for x in b]
    for x, y in zip(a, b):
        assert x.get("train/samples") == y.get("train/samples")
        for key in ("train/loss", "train/grad_norm", "eval/tabletop_arm/nll"):
            if key in x:  # the reduction over processes sums in another order than the one within a process
                assert abs(x[key] - y[key]) <= 1e-5 * abs(x[key])
    streams = [next((tmp_path / d / "checkpoints" / "3" / "meta").rglob("*")) for d in ("one", "two")]
    states = [json.loads(s.read_text())["stream"] for s in streams]
    assert states[0] == states[1]
