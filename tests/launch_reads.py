"""What SkyPilot, xpk and the API definition of JobSet make of what `vla-jax launch` renders: run by tests/test_launch_readers.py in a Python
that has them. KIND FILE; prints one line of JSON, {"refused": ...} where the program does not take it."""

import argparse
import contextlib
import io
import json
import os
import sys
from pathlib import Path


def skypilot(file: str) -> dict:
    os.environ["SKYPILOT_DISABLE_USAGE_COLLECTION"] = "1"
    import sky

    task = sky.Task.from_yaml(file)
    (machine,) = task.resources
    return {
        "name": task.name,
        "nodes": task.num_nodes,
        "accelerators": machine.accelerators,
        "spot": machine.use_spot,
        "recovery": machine.job_recovery,
        "envs": task.envs,
    }


def jobset(file: str) -> dict:
    """The same back: its models drop what they do not know, and add defaults."""
    import yaml
    from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

    return JobsetV1alpha2JobSet.from_dict(yaml.safe_load(Path(file).read_text())).to_dict()


def xpk(file: str) -> dict:
    """FILE: its arguments, a JSON list."""
    from xpk.parser.core import set_parser

    parser = argparse.ArgumentParser(prog="xpk")
    set_parser(parser=parser)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = parser.parse_args(json.loads(Path(file).read_text()))
    except SystemExit as e:
        raise ValueError(said.getvalue()) from e
    return {k: v for k, v in vars(found).items() if k != "func"}


if __name__ == "__main__":
    try:
        answer = {"skypilot": skypilot, "jobset": jobset, "xpk": xpk}[sys.argv[1]](sys.argv[2])
    except Exception as e:  # refusals are of many types
        answer = {"refused": f"{type(e).__name__}: {e}"}
    print(json.dumps(answer))
