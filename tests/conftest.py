"""Eight virtual CPU devices for everything that shards, the real sample where it is present, and one recorded tabletop set."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of the tests' time is compiling: LLVM's optimisations take two fifths of it, and save less when run.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Many tests compile the same small step: once in a session will do, for their subprocesses too. Anew in each session.
_compiled = tempfile.TemporaryDirectory(prefix="vla-jax-tests-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
jax.config.update("jax_compilation_cache_dir", _compiled.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that holds bridge_dataset/1.0.0."""
    root = Path(os.environ.get("VLA_REAL_DATA") or REPO.parent / "shared" / "data")
    if not (root / "bridge_dataset" / "1.0.0").is_dir():
        pytest.skip(f"the BridgeData V2 sample is not at {root}; set VLA_REAL_DATA to the folder that holds bridge_dataset/")
    return root


@pytest.fixture(scope="session")
def tabletop(tmp_path_factory) -> Path:
    """A few episodes of each tabletop robot, written by the real TFDS writer."""
    out = tmp_path_factory.mktemp("tabletop") / "data"
    command = [sys.executable, "-m", "vla_jax.tabletop.record", str(out), "--episodes", "12", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.fixture
def tiny(tabletop, tmp_path_factory):
    """load(*overrides) -> Config of a tiny model on the tabletop mixture."""
    from vla_jax import config

    index = tmp_path_factory.getbasetemp() / "index"
    small = [
        f"data.root={tabletop}",
        f"data.index_dir={index}",
        "data.holdout=0.2",
        "model.preset=tiny",
        "pack.rows=8",
        "pack.group=2",
        "pack.length=96",
        "pack.images=4",
        "pack.targets=64",
        "train.warmup=2",
        "train.eval_batches=1",
        "mesh.data=-1",
        "mesh.fsdp=2",
    ]
    return lambda *overrides: config.load("configs/demo.py", [*small, *overrides])[0]


@pytest.fixture(scope="session")
def openpi_run(tabletop, tmp_path_factory) -> Path:
    """The workdir of two steps of a tiny model in layout openpi, with a running mean of its weights: what exports begin with."""
    from vla_jax import config
    from vla_jax.train import loop

    base = tmp_path_factory.mktemp("openpi_run")
    layout = ["tokens.layout=openpi", "tokens.state=text", "tokens.text_model=default", "tokens.action_vocab=64", "tokens.limit=250"]
    pack = ["pack.rows=8", "pack.group=2", "pack.length=192", "pack.images=4", "pack.targets=192"]
    train = ["train.steps=2", "train.warmup=0", "train.ema=0.5", "train.eval_batches=1", "model.preset=tiny", "mesh.data=-1", "mesh.fsdp=2"]
    data = [f"data.root={tabletop}", f"data.index_dir={base / 'index'}", "data.holdout=0.2"]
    c, _ = config.load("configs/demo.py", [*data, *layout, *pack, *train])
    loop.train(loop.prepare(c, base / "run"), quiet=True)
    return base / "run"
