"""Runs compiled for TPUs that are not there (extra `tpu`), and what needs no compiler: shapes, costs, advice."""

import json
import subprocess
import sys

import jax
import pytest

from vla_jax import cli, config, hardware, paths, sharding
from vla_jax.hardware import GIB
from vla_jax.train import collectives, compile_check, fitting, roofline
from vla_jax.types import UserError

DIAL = "configs/oxe_3b.py:size={},chips={}"
SMALL = ("model.preset=debug", "model.vocab=8192", "data.image_size=64", "pack.length=512", "pack.images=3")


def load(spec, *overrides):
    return config.load(spec, overrides)[0]


@pytest.fixture(scope="module")
def libtpu():
    return pytest.importorskip("libtpu", reason="the extra `tpu` is not installed")


@pytest.fixture(autouse=True)
def quick():
    """The compiler at its quickest: a third of the time; what it says of memory is not what it says at its best (docs/log.md)."""
    jax.config.update("jax_optimization_level", "O0")
    yield
    jax.config.update("jax_optimization_level", "UNKNOWN")


def small(chips, *more):
    return load(DIAL.format("300m", chips), *SMALL, *more)


@pytest.mark.slow
@pytest.mark.parametrize("chips, topology", [("v5e-4", "v5e:2x2"), ("v5p-4", "v5p:2x2x1"), ("v6e-4", "v6e:2x2")])
def test_a_small_run(libtpu, chips, topology):
    """Everything that the report promises, and the numbers that can be had another way."""
    c = small(chips, "pack.rows=8")
    r = fitting.run(c, topology, quick=True, say=lambda line: None)
    n = 4
    assert r["fits"] and r["devices"] == r["chips"] == n and r["mesh"] == {"data": 1, "fsdp": n, "tensor": 1}
    m = r["memory"]
    # float32 parameters, and two moments of each: divided but for norms and biases
    assert r["parameters"] * 4 / n <= m["parameters"] < 1.1 * r["parameters"] * 4 / n
    assert m["optimizer"] == pytest.approx(2 * m["parameters"], rel=1e-3)
    assert m["total"] == pytest.approx(m["state"] + m["batch"] + m["activations"]) and 0 < m["activations"] < m["hbm"]
    assert r["flops"]["hardware"] > r["flops"]["model"] > 0
    sent = {kind: sum(two) for kind, two in r["collectives"].items()}
    # each device lacks most of the weights, in bfloat16: forward, backward, and the gradient's way back
    least = (1 - 1 / n) * 2 * (r["parameters"] - 8192 * 128)
    assert 2.5 * least < sum(sent.values()) < 8 * least, (sent, least)
    assert all(far == 0 for _, far in r["collectives"].values())
    assert r["step_s"] >= r["roofline_s"] > 0 and 0 < r["mfu"] < r["hfu"] < 1
    assert r["chip_hours"] == pytest.approx(r["days"] * 24 * 4)
    text = roofline.table(r)
    for word in ("parameters", "optimizer", "activations", "roofline", "MFU", "chip-hours", "assumed", "samples/s", "all-"):
        assert word in text, text
    assert json.loads(json.dumps(r)) == r


@pytest.mark.slow
def test_7x_in_a_process_with_the_stack_that_its_compiler_needs(libtpu, tmp_path):
    """Two devices a chip; its compiler ends a process with a stack of the usual size."""
    more = [f"--config.{x}" for x in (*SMALL, "pack.rows=8")]
    argv = ["compile-check", f"--config={DIAL.format('300m', 'tpu7x-4')}", "--topology=tpu7x:2x2x1", "--quick", *more]
    program = [sys.executable, "-m", "vla_jax.cli", *argv, f"--out={tmp_path / 'r.jsonl'}"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=paths.assets("configs").parent, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4 x tpu7x of 2 devices, mesh data=1 fsdp=8 tensor=1" in done.stdout
    (r,) = map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())
    assert r["fits"] and r["devices"] == 8 and sum(map(sum, r["collectives"].values())) > 0


@pytest.mark.slow
def test_two_slices_send_gradients_between_them_and_nothing_else(libtpu):
    c = small("v5e-8", "pack.rows=16", "mesh.data=2", "mesh.fsdp=4")
    r = fitting.run(c, "v5e:2x2", slices=2, quick=True, say=lambda line: None)
    near, far = (sum(two[i] for two in r["collectives"].values()) for i in (0, 1))
    # a device's part of the gradient goes there and comes back, in two bytes or in four, and what is narrow is filled up to 128
    part = r["parameters"] / 4
    assert 2 * part < far < 16 * part and near > far
    with pytest.raises(UserError, match="mesh.data is 1, and the 8 devices are 2 slices"):
        compile_check.Plan.make(small("v5e-8", "pack.rows=16", "mesh.data=1", "mesh.fsdp=8"), "v5e:2x2", 2)


@pytest.mark.slow
def test_what_does_not_fit_says_what_would(libtpu, capsys, tmp_path):
    """Exit 2, three remedies that were compiled, the fastest first."""
    argv = ["compile-check", f"--config={DIAL.format('300m', 'v5e-4')}", "--topology=v5e:2x2", f"--out={tmp_path / 'r.jsonl'}"]
    argv += [f"--config.{o}" for o in ("pack.rows=256", "model.remat=none", "pack.targets=64", "model.vocab=32768")]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert "DOES NOT FIT" in out and "Each of these fits, and was compiled; the fastest first" in err
    lines = [line for line in err.splitlines() if line.startswith("  --config.")]
    assert len(lines) == 3 and any("accumulate" in line for line in lines), err
    (r,) = [json.loads(x) for x in (tmp_path / "r.jsonl").read_text().splitlines()]
    rates = [x["report"]["samples_per_s"] for x in r["remedies"]]
    assert rates == sorted(rates, reverse=True) and all(x["report"]["memory"]["total"] < 15.75 * GIB for x in r["remedies"])


def test_the_verdict_comes_before_the_picture(monkeypatch, capsys, tmp_path):
    """A run that does not fit is told so, whatever is to be drawn; a line that was cut off in the file is passed over; a folder that is
    not there is known before anything is compiled."""
    from vla_jax import report

    fits = {"fits": True, "preset": "300m", "chip": "v5e", "chips": 4}
    monkeypatch.setattr(fitting, "run", lambda *a, **k: dict(fits))
    monkeypatch.setattr(roofline, "table", lambda r: "a table")
    monkeypatch.setattr(roofline, "advice", lambda r: "take less")
    drawn = []
    monkeypatch.setattr(report, "scaling_picture", lambda rows, out: drawn.append(len(rows)))
    file = tmp_path / "r.jsonl"
    file.write_text('{"fits": tr\n')
    argv = [
        "compile-check",
        f"--config={DIAL.format('300m', 'v5e-4')}",
        "--topology=v5e:2x2",
        f"--out={file}",
        f"--plot={tmp_path / 'p.svg'}",
    ]
    assert cli.main(argv) == 0 and drawn == [1]
    fits["fits"] = False
    assert cli.main(argv) == 2 and "take less" in capsys.readouterr().err and drawn == [1]
    monkeypatch.setattr(fitting, "run", None)
    assert cli.main([*argv[:3], f"--out={tmp_path / 'none' / 'r.jsonl'}"]) == 2
    assert cli.main(["compile-check", argv[1], "--topology=v5e:²x2"]) == 2


@pytest.mark.slow
def test_offloaded_inputs_wait_on_the_host(libtpu):
    """The layers' inputs, bfloat16, for every layer of encoder and decoder: on the host instead of on the chip."""
    by = {}
    for remat in ("full", "offload"):
        plan = compile_check.Plan.make(small("v5e-4", "pack.rows=8", "model.preset=100m", f"model.remat={remat}"), "v5e:2x2")
        by[remat] = compile_check.compiled(plan)
    rows, cfg = 2, plan.cfg
    inputs = 2 * rows * (512 * 640 * 12 + 3 * cfg.tokens_per_image * 384 * 12)
    assert by["full"].host == 0 and by["offload"].host == pytest.approx(inputs, rel=0.1)
    assert by["offload"].temp < by["full"].temp


@pytest.mark.slow
def test_the_largest_batch_is_the_largest(libtpu):
    c = small("v5e-4", "pack.rows=4", "model.preset=100m", "model.remat=none", "model.vocab=65536", "pack.length=1024")
    said = []
    plan = compile_check.Plan.make(c, "v5e:2x2")
    most = fitting.largest_rows(plan, compile_check.compiled(plan), said.append)
    assert most % 4 == 0 and most >= 8
    tried = {int(line.split()[0]): "does not" not in line for line in said}
    assert tried[most] and not tried[most + 4], said


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, chips, topology",
    [
        ("300m", "v5e-4", "v5e:2x2"),
        ("1b", "v5e-16", "v5e:4x4"),
        ("3b", "v5e-16", "v5e:4x4"),
        ("300m", "v6e-4", "v6e:2x2"),
        ("300m", "v5p-4", "v5p:2x2x1"),
    ],
)
def test_the_dial_fits_where_it_says(libtpu, size, chips, topology):
    """As written, on the smallest topologies it is meant for: larger ones leave more room on each chip. By the compiler at its best."""
    jax.config.update("jax_optimization_level", "UNKNOWN")
    r = fitting.run(load(DIAL.format(size, chips)), topology, quick=True, say=lambda line: None)
    assert r["fits"] and r["memory"]["total"] < 0.9 * r["memory"]["hbm"] and r["mfu"] > 0.4 and not r["replicated"]


@pytest.mark.parametrize("size", ["300m", "1b", "3b"])
@pytest.mark.parametrize("chips", ["v5e-16", "v5e-64", "v5e-256", "v5e-1024", "v5p-64", "v6e-256", "tpu7x-64", "h200-8", "v5e-1"])
def test_the_dial_divides(size, chips):
    """Every setting: rows divide over the chips, weights over fsdp, and slices are crossed by data alone."""
    c = load(DIAL.format(size, chips))
    kind, _, n = chips.partition("-")
    devices = int(n) * (2 if kind == "tpu7x" else 1)
    assert c.mesh.data * c.mesh.fsdp == devices and c.pack.rows % devices == 0 and c.pack.rows % c.pack.group == 0
    assert all(width % c.mesh.fsdp == 0 for width in (1152, 2048, 257152)) and c.model.preset == size
    assert c.mesh.data % max(1, int(n) // 256) == 0 or kind not in ("v5e", "v6e")
    assert 1e-6 < c.train.lr < 1e-3 and c.train.steps >= 1000 and c.train.warmup < c.train.steps


@pytest.mark.parametrize(
    "size, chips, topology, slices",
    [
        ("3b", "v5e-1", "v5e:1x1", 1),
        ("300m", "v6e-1", "v6e:1x1", 1),
        ("300m", "v5p-1", "v5p:1x1x1", 1),
        ("3b", "v5e-256", "v5e:16x16", 1),
        ("3b", "v5e-1024", "v5e:16x16", 4),
        ("3b", "v6e-16", "v6e:4x4", 1),
        ("3b", "v6e-256", "v6e:16x16", 1),
        ("300m", "v6e-128", "v6e:8x16", 1),
        ("3b", "v6e-512", "v6e:16x16", 2),
        ("3b", "v5p-128", "v5p:4x4x8", 1),
        ("1b", "v5p-192", "v5p:4x4x12", 1),
        ("3b", "tpu7x-64", "tpu7x:4x4x4", 1),
    ],
)
def test_the_dial_has_a_mesh_on_its_chips(libtpu, size, chips, topology, slices):
    """Axes of the mesh laid on the torus, where one of its sides may have to serve two of them."""
    plan = compile_check.Plan.make(load(DIAL.format(size, chips)), topology, slices)
    assert plan.mesh.size == plan.config.mesh.data * plan.config.mesh.fsdp
    assert len({d.id for d in plan.mesh.devices.flat}) == plan.mesh.size


@pytest.mark.parametrize("chip, sides", [("v6e", "16x16"), ("v5p", "4x4x4"), ("tpu7x", "4x4x4")])
def test_every_division_has_a_mesh(libtpu, chip, sides):
    devices = compile_check.devices(f"{chip}:{sides}", 1)
    for k in range(9):
        for tensor in (1, 2, 4, 8):
            if len(devices) % (2**k * tensor) == 0:
                assert sharding.make_mesh(2**k, -1, tensor, devices=devices).size == len(devices)


@pytest.mark.parametrize(
    "more, says",
    [
        (("pack.rows=4", "pack.group=8"), "not a multiple of pack.group 8"),
        (("model.expert=debug", "train.objective=both", "model.expert_dims=4"), "more than model.expert_dims 4"),
        (("pack.length=32", "pack.targets=16"), "tokens but pack.length is 32"),
        (("pack.targets=8",), "targets but pack.targets is 8"),
        (("pack.images=1", "data.history=2"), "images but pack.images is 1"),
    ],
)
def test_what_training_would_refuse_is_refused(libtpu, more, says):
    c = load("configs/debug.py:bridge", *more)
    with pytest.raises(UserError, match=says):
        compile_check.Plan.make(c, "v5e:2x2")


def test_the_dial_scales_as_derived():
    lr = lambda size, chips: load(DIAL.format(size, chips)).train.lr
    assert lr("300m", "v5e-1024") > lr("3b", "v5e-1024")
    a, b = load(DIAL.format("3b", "v5e-64")), load(DIAL.format("3b", "v5e-256"))
    assert b.pack.rows == 4 * a.pack.rows and b.train.lr == pytest.approx(2 * a.train.lr)
    assert a.train.steps == pytest.approx(4 * b.train.steps, rel=0.01)
    for arg in ("size=7t", "chips=v5e", "chips=v9-4", "size=3b,colour=red", "3b", "size=3b,size=1b", "chips=v5e-300", "chips=h200-12"):
        with pytest.raises(UserError, match="size is one of|write size=|several slices"):
            load(f"configs/oxe_3b.py:{arg}")


def test_without_libtpu_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    assert cli.main(["compile-check", f"--config={DIAL.format('3b', 'v5e-16')}", "--topology=v5e:4x4"]) == 2
    assert "vla-jax[tpu]" in capsys.readouterr().err


def test_refusals(libtpu, capsys):
    spec = f"--config={DIAL.format('3b', 'v5e-16')}"
    for argv, said in (
        ([spec, "--topology=v5e:8x8"], "but there are 64 devices"),
        ([spec, "--topology=v5e:3x5"], "Sides are multiples"),
        ([spec, "--topology=v5x:3x5"], "chips: v5e"),
        ([spec, "--topology=v5e:4x4", "--config.pack.rows=17"], "not divisible"),
        ([spec, "--topology=v5e:4x4", "--config.tokens.text_model=/no/such.model"], "does not exist"),
        ([spec], "--topology"),
    ):
        assert cli.main(["compile-check", *argv]) == 2
        assert said in capsys.readouterr().err, argv


def test_a_report_without_a_compiler(libtpu):
    """7x has two devices a chip; and what is derived from memory, traffic and time."""
    plan = compile_check.Plan.make(small("tpu7x-4", "pack.rows=8"), "tpu7x:2x2x1")
    r = compile_check.report(plan, compile_check.Compiled(float(GIB), 0.0, HLO, 1.0))
    assert (r["devices"], r["chips"]) == (8, 4) and r["better_mesh"] is None
    m = r["memory"]
    assert m["total"] == m["parameters"] + m["optimizer"] + m["batch"] + GIB and m["batch"] > 8 / 8 * 3 * 64 * 64 * 3
    assert r["chip_hours"] == pytest.approx(r["steps"] * r["step_s"] / 3600 * 4)
    assert r["tokens_per_s"] == pytest.approx(r["samples_per_s"] * r["sample_tokens"])
    assert r["mfu"] == pytest.approx(r["flops"]["model"] / 8 / r["step_s"] / (2307e12 / 2))
    assert 1 <= r["samples_per_s"] * r["step_s"] / 8 <= 4
    nothing = r | {"fits": False, "why": "too large"}
    assert "take more chips" in roofline.advice(nothing)
    assert "alone take" in roofline.advice(nothing | {"memory": m | {"state": m["hbm"]}})


def test_7x_is_refused_where_its_compiler_would_crash(libtpu, monkeypatch):
    import resource

    plan = compile_check.Plan.make(small("tpu7x-4", "pack.rows=8"), "tpu7x:2x2x1")
    monkeypatch.setattr(resource, "getrlimit", lambda what: (8 << 20, resource.RLIM_INFINITY))
    with pytest.raises(UserError, match="ulimit -s unlimited"):
        compile_check.compiled(plan)


def test_more_cameras_than_a_row_has_images_are_refused(libtpu):
    with pytest.raises(UserError, match="has 6 images but pack.images is 3"):
        compile_check.Plan.make(small("v5e-4", "pack.rows=8", "data.history=2"), "v5e:2x2")


HLO = """HloModule jit_step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%cond (p: (s32[], bf16[8,4])) -> pred[] {
  %limit = s32[] constant(6)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {
  %whole = f32[8]{0} all-reduce(%p), channel_id=9, replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %part = f32[2]{0} dynamic-slice(%whole, %mine)
}

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %two = s32[] constant(2)
  %i.1 = s32[] get-tuple-element(%p), index=0
  %next = s32[] add(%i.1, %two)
  %w = bf16[8,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="jit(step)/mlp/dot"}
  %again = bf16[8,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %send = (bf16[2,4]{1,0}, bf16[2,4]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=2, source_target_pairs={{0,1},{1,0}}
  ROOT %t = (s32[], bf16[8,4]) tuple(%next, %w)
}

ENTRY %main (x: bf16[8,4]) -> f32[4] {
  %loop = (s32[], bf16[8,4]) while(%start), condition=%cond, body=%body
  %g = f32[4]{0} all-reduce(%y), channel_id=3, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%sum
  %r = f32[2]{0} reduce-scatter(%y), channel_id=4, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, to_apply=%sum
  %s = f32[4]{0} all-reduce(%y), channel_id=5, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%sum
  %out.1 = (f32[3,8]{1,0:T(8,128)}, u32[], token[]) send(%g, %token), channel_id=7, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %fused = f32[2]{0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = f32[4]{0} add(%g, %s)
}
"""


def test_collectives_of_a_text_that_is_known():
    found = collectives.read(HLO, 8, 2)
    assert sorted((c.kind, c.times, c.bytes, c.group, c.across) for c in found) == [
        ("all-gather", 3, 8 * 4 * 2 * 3 / 4, 4, False),  # six by twos; both lines are one operation
        ("all-reduce", 1, 2 * 16 * 1 / 2, 2, True),
        ("all-reduce", 1, 2 * 16 * 1 / 2, 2, True),
        ("all-reduce", 1, 3 * 8 * 4 * 2 / 2, 2, True),  # through the host, to the other slice and back
        ("collective-permute", 3, 2 * 4 * 2.0, 2, False),
        ("reduce-scatter", 1, 8 * 3.0, 4, False),
        ("reduce-scatter", 1, 8 * 3.0, 4, False),  # as a fusion: 32 bytes, of which three quarters come from others
    ]
    (gather,) = [c for c in found if c.kind == "all-gather"]
    assert gather.name == "jit(step)/mlp/dot" and gather.dtypes == ("bf16",)


def test_bounds_and_prediction():
    one = roofline.Step(model=4e15, hardware=5e15, devices=64, state_bytes=1e9, weight_bytes=6e9, passes=4, ici=2e10, dcn=1e8)
    chip = hardware.TPUS["v5e"]
    bounds = one.bounds(chip)
    assert bounds["compute"] == pytest.approx(5e15 / 64 / 197e12) and bounds["ici"] == pytest.approx(2e10 / 100e9)
    assert bounds["memory"] == pytest.approx((2e9 + 48e9) / 819e9) and bounds["dcn"] == pytest.approx(1e8 / 3.1e9)
    least, said = one.seconds(chip)
    assert least == bounds["compute"] and said == pytest.approx(bounds["compute"] / roofline.EFFICIENCY)


def test_leaves_that_an_axis_does_not_divide(libtpu):
    """The ViT's width at fsdp=256: named with its cost, and the mesh that avoids it."""
    c = load(DIAL.format("3b", "v5e-256"), "mesh.data=1", "mesh.fsdp=256")
    plan = compile_check.Plan.make(c, "v5e:16x16")
    lost, better = compile_check.replicated(plan), compile_check.better_mesh(plan)
    assert lost and all(x["axis"] == "fsdp" and 1152 in x["shape"] for x in lost)
    state = compile_check.state_bytes(*plan.state)
    assert sum(state.values()) / GIB == pytest.approx(4.75, abs=0.15)  # as measured with a stand-in before this was written
    divided = 3 * 4 * 2_923_355_888 / 256  # what the state would take if all of it were divided
    assert 0.998 < sum(x["bytes"] for x in lost) / (sum(state.values()) - divided) < 1  # leaves below 1 MiB are not named
    assert better["fsdp"] == 128 and better["data"] == 2 or better["fsdp"] == 64
    assert better["state_bytes"] < 0.7 * GIB
