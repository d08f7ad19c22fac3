"""A run's launch, rendered from its config: chips, topology, hosts, processes, mesh and rows must agree, and are held together here.

What is rendered ends in the same line on every host, `vla-jax train --config="$CONFIG" --workdir="$WORKDIR"`; the files that it is made of
are in launch/.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from vla_jax import hardware, paths
from vla_jax.config import Config
from vla_jax.types import UserError

RENDERED = b"# rendered by vla-jax launch"  # how the files begin that may be written over
RESUMABLE = 75  # exit code of a run that saved itself on request, where the restarter must tell it from a finished one
_HOST = {"cpu": 2, "v5e": 4, "v5p": 4, "v6e": 4, "tpu7x": 4, "a100": 8, "h100": 8, "h200": 8, "b200": 8}  # chips of one
_GKE = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice", "tpu7x": "tpu7x"}
# HOST/path/name:TAG@DIGEST, of which all but the last name may be missing
_IMAGE = re.compile(
    r"([a-zA-Z0-9]([-.a-zA-Z0-9]*[a-zA-Z0-9])?(:[0-9]+)?/)?[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"
    r"(:[a-zA-Z0-9_][-.a-zA-Z0-9_]{0,127})?(@[a-z0-9]+:[0-9a-f]{32,})?"
)
_RUNTIME = {"v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e", "tpu7x": "v2-alpha-tpu7-ubuntu2404"}


@dataclasses.dataclass(frozen=True)
class Machines:
    """chips of one kind, on so many hosts of so many chips; slices of TPUs, and the topology of each ("" for GPUs); devices as jax counts."""

    kind: str
    chips: int
    slices: int
    hosts: int
    topology: str

    @classmethod
    def of(cls, text: str, topology: str = "") -> Machines:
        """`v5e-64`, `h200-16`; topology: of one slice, where it is not the usual one. Raises: UserError."""
        kind, _, count = text.partition("-")
        if kind not in _HOST or not count.isdecimal() or int(count) < 1:
            raise UserError(f"--chips={text}: write KIND-NUMBER, such as v5e-64; kinds: {', '.join(_HOST)}")
        chips, tpu = int(count), hardware.TPUS.get(kind)
        slices = -(-chips // tpu.slice) if tpu else 1
        if topology:
            if tpu is None:
                raise UserError(f"--topology={topology}: {kind} has none")
            _, sides = hardware.topology(f"{kind}:{topology}")
            slices, rest = divmod(chips, math.prod(sides))
            if rest or not slices:
                raise UserError(f"--topology={topology} is {math.prod(sides)} chips a slice, and --chips={text} is no multiple of it")
        elif tpu:
            if chips > tpu.slice and chips % tpu.slice:
                raise UserError(f"--chips={text}: more than {tpu.slice} chips are several slices of so many: take a multiple of it")
            topology = _topology(chips // slices, tpu.torus, text)
        each = min(chips // slices, _HOST[kind])
        if chips // slices % each:
            raise UserError(f"--chips={text}: hosts have {each} chips: take a multiple of it")
        return cls(kind, chips, slices, chips // each, topology)

    @property
    def per_host(self) -> int:
        return self.chips // self.hosts

    @property
    def devices(self) -> int:
        return self.chips * (hardware.TPUS[self.kind].cores if self.tpu else 1)

    @property
    def tpu(self) -> bool:
        return self.kind in hardware.TPUS

    @property
    def cloud_type(self) -> str:
        """Of one slice, as Cloud TPU names it; v5p counts cores there, two a chip."""
        n = self.chips // self.slices
        return {"v5e": f"v5litepod-{n}", "v5p": f"v5p-{2 * n}", "v6e": f"v6e-{n}", "tpu7x": f"tpu7x-{2 * n}"}[self.kind]


def _topology(chips: int, torus: int, text: str) -> str:
    """The usual sides of a slice: as even as powers of two can be, the last ones larger."""
    if chips & (chips - 1) or chips == 2:
        raise UserError(f"--chips={text}: a slice of {chips} chips has no usual topology: give --topology, such as --topology=4x4x12")
    power = chips.bit_length() - 1
    if torus == 3 and chips == 4:
        return "2x2x1"
    return "x".join(str(2 ** ((power + i) // torus)) for i in range(torus))


def check(config: Config, machines: Machines, *, where: str) -> None:
    """Raises: UserError, the one that training would raise there, where the config cannot run on these machines, a process on each host."""
    from jax.sharding import AbstractMesh

    from vla_jax import sharding
    from vla_jax.data import stream

    m = config.mesh
    sizes = sharding.divided(m.data, m.fsdp, m.tensor, devices=machines.devices, slices=machines.slices, where=where)
    sharding.check_batch(config.pack.rows, AbstractMesh(sizes, sharding.AXES), parts=config.train.accumulate, where=where)
    stream.groups(config, machines.hosts)


@dataclasses.dataclass(frozen=True)
class Options:
    """What a config does not know."""

    config: str  # FILE[:ARG], as every host finds it
    workdir: str
    data_root: str = ""
    name: str = "vla"
    image: str = ""
    project: str = ""
    zone: str = ""
    cluster: str = ""
    partition: str = ""
    spot: bool = False
    mounted: bool = False
    restarts: int = 100


SAYS = {
    "data_root": "folder or URL of the datasets (VLA_DATA_ROOT), where the config names none",
    "name": "of the job (default: vla)",
    "image": "container image, from launch/Dockerfile (jobset, xpk, docker; skypilot if you like)",
    "project": "Google Cloud project (tpu-vm, xpk)",
    "zone": "Google Cloud zone (tpu-vm, xpk)",
    "cluster": "GKE cluster (xpk)",
    "partition": "Slurm partition",
    "spot": "machines that may be taken away, and are cheaper (tpu-vm, jobset, xpk, skypilot)",
    "mounted": "the workdir is storage that the machines or the image have mounted; nothing here mounts it",
    "restarts": "after failures, at most; where the launcher can tell, being taken away does not count (default: 100)",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """commands: shell lines that start it, from the repository; files: {name: text} that they need, which are written first."""

    commands: tuple[str, ...]
    files: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """A shell script that does all of it."""
        files = [f"cat > {name} <<'END_OF_FILE'\n{text}END_OF_FILE" for name, text in self.files.items()]
        return "\n".join([*files, *self.commands])


def render(kind: str, machines: Machines, options: Options) -> Launch:
    """kind: one of KINDS. Raises: UserError when something that this kind needs was not said, or is not for these machines."""
    needs = {"jobset": ("image",), "xpk": ("cluster", "project", "zone", "image"), "tpu-vm": ("project", "zone"), "docker": ("image",)}
    if missing := [f"--{name}" for name in needs.get(kind, ()) if not getattr(options, name)]:
        raise UserError(f"launch {kind} needs {', '.join(missing)}")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
        raise UserError(f"--name={options.name}: small letters, digits and -, at most 40, the first a letter: it becomes a host's name")
    if options.restarts < 0:
        raise UserError(f"--restarts={options.restarts}: 0 or more")
    if options.image and not _IMAGE.fullmatch(options.image):
        raise UserError(f"--image={options.image} names no image: write HOST/path/name:TAG, the path in small letters, without spaces")
    _check_workdir(kind, options)
    if kind in ("tpu-vm", "jobset", "xpk") and not machines.tpu:
        raise UserError(f"launch {kind} is for TPUs, and {machines.kind} is none: slurm and skypilot are for GPUs, too")
    if (kind == "local") != (machines.kind == "cpu"):
        raise UserError(
            "launch local runs on simulated devices of this machine: --chips=cpu-4 is two processes of two; and nothing else does"
        )
    if kind == "slurm" and machines.tpu:
        raise UserError(f"launch slurm is for GPUs, and {machines.kind} is a TPU: tpu-vm, jobset, xpk or skypilot")
    if kind == "tpu-vm" and machines.slices > 1:
        raise UserError(f"launch tpu-vm makes one slice, and {machines.kind}-{machines.chips} is {machines.slices}: jobset, xpk")
    return KINDS[kind](machines, options)


def _check_workdir(kind: str, o: Options) -> None:
    """Machines of a cloud have a disk of their own, which goes with them: what is on it is no run. Raises: UserError."""
    wrong = f"launch {kind} --workdir={o.workdir}"
    if not o.workdir.strip():
        raise UserError(f"{wrong} is empty: say where the run is kept, such as gs://BUCKET/runs/a")
    if "://" in o.workdir:  # what train.workdir.place takes
        if not re.fullmatch(r"gs://[^/\s]+/+[^/].*", o.workdir):
            raise UserError(f"{wrong}: a run is kept in a folder or at gs://BUCKET/path; another store must be mounted as a folder")
        return
    absolute = o.workdir.startswith("/")
    if kind in ("jobset", "xpk", "tpu-vm", "skypilot") and not (o.mounted and absolute):
        raise UserError(
            f"{wrong} would be on the machines' own disks, which go with them: give gs://BUCKET/path, "
            "or --mounted with an absolute path on storage that the machines or the image have mounted"
        )
    if kind == "slurm" and not absolute:
        raise UserError(f"{wrong}: give an absolute path on storage that every node sees, or gs://BUCKET/path")


def run(launch: Launch) -> int:
    """Does it in the current folder, where its files are written; the exit code. Raises: UserError when a program that it needs is not
    there, or a file is there that is not ours to write over."""
    wanted = {line.split()[0] for line in launch.commands} - {"export"}
    if missing := sorted(word for word in wanted if not shutil.which(word) and not (Path(word).exists())):
        raise UserError(
            f"{', '.join(missing)} is not here: install it and be in the repository's folder, or take what --dry-run prints elsewhere"
        )
    for name in launch.files:
        if os.path.lexists(name) and not (Path(name).is_file() and Path(name).read_bytes().startswith(RENDERED)):
            raise UserError(f"{Path(name).absolute()} is there, and launch did not write it: move it, or call launch in another folder")
    for name, text in launch.files.items():
        Path(name).write_text(text)
    return subprocess.run(["bash", "-ec", "\n".join(launch.commands)], check=False).returncode


def _set(**values: str) -> str:
    """`A=b C='d e'`, without those that are empty."""
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in values.items() if value)


def _run(o: Options) -> dict[str, str]:
    return {"CONFIG": o.config, "WORKDIR": o.workdir, "VLA_DATA_ROOT": o.data_root}


def _local(m: Machines, o: Options) -> Launch:
    more = f" --restarts {o.restarts}" if o.restarts else ""
    train = f'launch/local.sh -n {m.hosts} -d {m.per_host}{more} -- train --config="$CONFIG" --workdir="$WORKDIR"'
    return Launch((f"export {_set(**_run(o))}", train))


def _slurm(m: Machines, o: Options) -> Launch:
    more = f" --partition={shlex.quote(o.partition)}" if o.partition else ""
    batch = f"sbatch --job-name={o.name} --nodes={m.hosts} --gpus-per-node={m.per_host}{more} launch/slurm.sbatch"
    return Launch((f"export {_set(**_run(o), VLA_MAX_RESTARTS=str(o.restarts))}", batch))


def _tpu_vm(m: Machines, o: Options) -> Launch:
    about = {"PROJECT": o.project, "ZONE": o.zone, "NAME": o.name, "TPU_TYPE": m.cloud_type, "RUNTIME": _RUNTIME[m.kind]}
    steps = (f"launch/tpu_vm.sh {step}" for step in ("create", "install", "run"))
    return Launch((f"export {_set(**about, SPOT='1' if o.spot else '', **_run(o))}", *steps))


def _xpk(m: Machines, o: Options) -> Launch:
    about = {"CLUSTER": o.cluster, "PROJECT": o.project, "ZONE": o.zone, "IMAGE": o.image, "NAME": o.name, "TPU_TYPE": m.cloud_type}
    more = {"SLICES": str(m.slices), "VLA_MAX_RESTARTS": str(o.restarts)}
    return Launch((f"export {_set(**about, **more, **_run(o))}", f"launch/xpk.sh{' --spot' if o.spot else ''}"))


def _docker(m: Machines, o: Options) -> Launch:
    build = f"docker build -f launch/Dockerfile --build-arg EXTRA={'tpu' if m.tpu else 'cuda'} -t {shlex.quote(o.image)} ."
    return Launch((build, f"docker push {shlex.quote(o.image)}"))


def _jobset(m: Machines, o: Options) -> Launch:
    made = _template("jobset.yaml")
    made["metadata"]["name"] = o.name
    made["spec"]["failurePolicy"]["maxRestarts"] = o.restarts
    (job,) = made["spec"]["replicatedJobs"]
    spec, job["replicas"] = job["template"]["spec"], m.slices
    spec["parallelism"] = spec["completions"] = m.hosts // m.slices
    pod = spec["template"]["spec"]
    pod["nodeSelector"] = {"cloud.google.com/gke-tpu-accelerator": _GKE[m.kind], "cloud.google.com/gke-tpu-topology": m.topology}
    if o.spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
    (container,) = pod["containers"]
    container["image"] = o.image
    container["env"] = [{"name": k, "value": v} for k, v in {**_run(o), "VLA_RESUMABLE_EXIT": str(RESUMABLE)}.items() if v]
    container["resources"]["limits"]["google.com/tpu"] = m.per_host
    return Launch(("kubectl apply -f jobset.yaml",), {"jobset.yaml": _dump(made)})


def _skypilot(m: Machines, o: Options) -> Launch:
    made = _template("skypilot.yaml")
    made["name"] = o.name
    made["resources"] |= {"use_spot": o.spot, "job_recovery": {"strategy": "FAILOVER", "max_restarts_on_errors": o.restarts}}
    if m.tpu:
        if m.slices > 1:
            raise UserError(f"launch skypilot makes one slice, and {m.kind}-{m.chips} is {m.slices}: jobset, xpk")
        name = {"v5e": "v5litepod", "tpu7x": "tpu7x"}.get(m.kind, m.kind)
        made["num_nodes"] = 1  # a slice, whatever its hosts
        made["resources"] |= {
            "accelerators": f"tpu-{name}-{m.cloud_type.rpartition('-')[2]}:1",
            "accelerator_args": {"runtime_version": _RUNTIME[m.kind]},
        }
        made["envs"]["EXTRA"] = "tpu"
    else:
        made["num_nodes"], made["resources"]["accelerators"] = m.hosts, f"{m.kind.upper()}:{m.per_host}"
    if o.image:
        made["resources"]["image_id"] = f"docker:{o.image}"
    made["envs"] |= {k: v for k, v in _run(o).items() if v}
    return Launch((f"sky jobs launch --name {o.name} skypilot.yaml",), {"skypilot.yaml": _dump(made)})


def _template(name: str) -> dict:
    import yaml

    return yaml.safe_load(Path(paths.assets("launch") / name).read_text())


def _dump(made: dict) -> str:
    """YAML, in which scripts are blocks; its first line says that it is ours."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_representer(str, lambda d, x: d.represent_scalar("tag:yaml.org,2002:str", x, style="|" if "\n" in x else None))
    first = f"{RENDERED.decode()}, which writes over it: take this line out to keep what you change\n"
    return first + yaml.dump(made, Dumper=Dumper, sort_keys=False, width=140)


KINDS = {"local": _local, "slurm": _slurm, "tpu-vm": _tpu_vm, "jobset": _jobset, "xpk": _xpk, "skypilot": _skypilot, "docker": _docker}
