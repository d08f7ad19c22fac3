"""The house rules that a machine can check."""

import ast
import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SOURCES = sorted((REPO / "vla_jax").rglob("*.py"))
FLOORS = {
    "types": 0,
    "config": 0,
    "paths": 0,
    "tree": 0,
    "folders": 0,
    "console": 0,
    "launch": 1,
    "hardware": 0,
    "__init__": 0,
    "distributed": 1,
    "sharding": 1,
    "data": 1,
    "tokens": 1,
    "tabletop": 1,
    "sims": 1,
    "models": 2,
    "train": 3,
    "deploy": 4,
    "bench": 4,
    "report": 4,
    "demo": 5,
    "study": 5,
    "cli": 5,
}
# package -> the only files that may import it
ONLY = {
    "flax": {"models/"},
    "orbax": {"train/checkpoint.py", "deploy/openpi.py", "models/pretrained.py", "models/weight_files.py"},
    "tensorflow": {"tabletop/record.py", "data/convert.py", "bench/data_peers.py", "bench/data_sets.py"},
    "tensorflow_datasets": {
        "tabletop/record.py",
        "sims/record.py",
        "data/write.py",
        "data/convert.py",
        "bench/data_peers.py",
        "bench/data_sets.py",
    },
    "rlds": {"tabletop/record.py"},
    "pyarrow": {"data/lerobot.py"},
    "av": {"data/video.py", "deploy/film.py"},
    "h5py": {"data/hdf5.py"},
    "matplotlib": {"report.py", "study/page.py"},
    **{simulator: {"sims/environments.py"} for simulator in ("gymnasium", "metaworld", "mujoco", "gym_pusht", "robosuite")},
    "websockets": {"deploy/serve.py", "deploy/client.py"},
    "msgpack": {"deploy/wire.py"},
}


def imports(path):
    """(module, whether at the top of the file) of every import."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((a.name, id(node) in top) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = "vla_jax" + (f".{module}" if module else "")
            for a in node.names:
                yield (f"{module}.{a.name}" if module.startswith("vla_jax") else module), id(node) in top


def name(path):
    return str(path.relative_to(REPO / "vla_jax"))


def room(module):
    return (module.split(".") + ["__init__"])[1]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_go_down_only(path):
    here = FLOORS[name(path).split("/")[0].removesuffix(".py")]
    for module, _ in imports(path):
        if module.startswith("vla_jax."):
            there = FLOORS.get(room(module), 0)
            assert there <= here, f"{name(path)} (floor {here}) imports {module} (floor {there})"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_bans(path):
    for module, _ in imports(path):
        package, file = module.split(".")[0], name(path)
        if package in ONLY:
            assert any(file.startswith(x) for x in ONLY[package]), f"{file} imports {package}"
        if package == "jax":
            assert not file.startswith(("tokens/", "tabletop/", "sims/")), f"{file} imports jax"
            assert not file.startswith("data/") or file == "data/feed.py", f"{file} imports jax"
    text = path.read_text()
    assert "pickle" not in text and "yaml.load(" not in text
    assert not re.search(r"class \w+\(.*(Base|Manager|Factory|Helper)\b", text)


def test_no_class_of_ours_inherits_from_another_of_ours():
    classes = {n.name: n for p in SOURCES for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.ClassDef)}
    for cls in classes.values():
        assert not [b.id for b in cls.bases if isinstance(b, ast.Name) and b.id in classes], cls.name


def test_sizes_and_names():
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 400, path
        assert path.stem not in ("utils", "helpers", "misc")
    assert not list((REPO / "configs").glob("__init__.py")) and not list((REPO / "data").rglob("*.py"))


def test_readme_shows_the_tree_as_it_is():
    """Every path in the README's tree exists, and every file of the package is in it."""
    block = re.search(r"## The tree\n+```\n(.*?)```", (REPO / "README.md").read_text(), re.S).group(1)
    shown, folder = set(), ""
    for line in block.splitlines():
        if not line.startswith(" "):  # a folder and its first files, or files of the root
            first, *rest = line.split("  ")[0].split()
            folder = first if first.endswith("/") else ""
            shown |= {first, *(folder + w for w in rest)}
        else:
            shown |= {folder + w for w in line.strip().split("  ")[0].split()}
    for path in shown:
        assert (REPO / path).exists(), f"README shows {path}"
    for path in SOURCES:
        if path.name != "__init__.py":
            assert f"vla_jax/{name(path)}" in shown, f"README lacks vla_jax/{name(path)}"
    for folder in ("configs", "launch", "docs"):
        for path in (REPO / folder).iterdir():
            if path.is_file():
                assert f"{folder}/{path.name}" in shown, f"README lacks {folder}/{path.name}"


def test_help_imports_nothing_heavy():
    """`vla-jax --help` answers at once because these are not imported."""
    import subprocess
    import sys

    code = (
        "import sys\ntry:\n  from vla_jax.cli import main; main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('jax', 'numpy', 'tensorflow', 'flax', 'orbax', 'cv2', 'yaml') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True)
    assert done.stderr.strip() == "[]" and "COMMAND" in done.stdout


def test_repo_names_no_registry_and_no_lock():
    tracked = (REPO / "constraints.txt", REPO / "pyproject.toml")
    for p in tracked:
        assert not re.search(r"https?:/", p.read_text())
