"""Which code this is."""

import shutil
import subprocess
from pathlib import Path

import pytest

from vla_jax import __version__, paths
from vla_jax.bench import run


@pytest.fixture(autouse=True)
def forgotten():
    paths.commit.cache_clear()
    yield
    paths.commit.cache_clear()


def git(folder: Path, *words: str) -> str:
    named = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(folder), *named, *words], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A repository whose one package is where `paths` believes to lie."""
    (tmp_path / "vla_jax").mkdir()
    shutil.copy(paths.__file__, tmp_path / "vla_jax")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    monkeypatch.setattr(paths, "_PACKAGE", (tmp_path / "vla_jax").resolve())
    return tmp_path


def test_the_commit_of_a_checkout(checkout):
    head = git(checkout, "rev-parse", "--short", "HEAD")
    (checkout / "notes").write_text("not the code")
    assert paths.commit() == head
    (checkout / "vla_jax" / "paths.py").write_text("# changed")
    paths.commit.cache_clear()
    assert paths.commit() == head + "+"


def test_somebody_elses_repository_is_not_ours(checkout, monkeypatch):
    """A wheel in a virtual environment that lies in a lab's own checkout."""
    inside = checkout / ".venv" / "site-packages" / "vla_jax"
    inside.mkdir(parents=True)
    monkeypatch.setattr(paths, "_PACKAGE", inside.resolve())
    assert paths.commit() == __version__


def test_machines_without_git(monkeypatch):
    """Images have none, and whatever is written there is still written."""
    monkeypatch.setenv("PATH", "/nonexistent")
    assert paths.commit() == __version__ and run.stamp()["commit"] == __version__
