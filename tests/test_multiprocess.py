"""Two real processes of two devices each give the run that one process of four gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def test_two_processes_equal_one(tabletop, tmp_path):
    """Training, and the evaluation of what was trained, whose chunks are decoded on all devices together."""

    def argv(command, workdir, *more):
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
        return [command, "--config=configs/demo.py", *(f"--config.{k}={v}" for k, v in pairs.items()), f"--workdir={workdir}", *more]

    base = {k: v for k, v in os.environ.items() if not k.startswith("VLA_")} | {"JAX_PLATFORMS": "cpu"}
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    program = bin_dir / "vla-jax"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m vla_jax.cli "$@"\n')
    program.chmod(0o755)

    def run(before, env, arguments):
        done = subprocess.run(
            [*before, *arguments], env={**base, **env}, cwd=REPO, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    alone = lambda arguments: run([sys.executable, "-m", "vla_jax.cli"], {"JAX_NUM_CPU_DEVICES": "4"}, arguments)
    local = ["bash", str(REPO / "launch/local.sh"), "-n", "2", "-d", "2", "--"]
    together = lambda arguments: run(local, {"PATH": f"{bin_dir}:{base['PATH']}"}, arguments)
    alone(argv("train", tmp_path / "one"))
    together(argv("train", tmp_path / "two"))
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

    # the same checkpoint, by one process and by two: only the first of the two speaks
    few = argv("eval", tmp_path / "two", "--frames", "3")
    one = json.loads(alone(few))
    said = "".join(line.removeprefix("[0] ") for line in together(few).splitlines(keepends=True))
    two = json.loads(said[said.index("{") :])
    assert one.keys() == two.keys() and one["step"] == two["step"] == 3
    for name in ("tabletop_slider", "tabletop_arm", "tabletop_bimanual"):
        assert one[name]["valid"] == two[name]["valid"] == 1.0 and one[name]["targets"] == two[name]["targets"]
        for key in ("mae", "baseline"):
            assert all(abs(one[name][key][u] - two[name][key][u]) <= 1e-5 for u in one[name][key])
