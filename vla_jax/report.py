"""Pictures for people, and the demo's table at its end."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vla_jax.deploy.rollout import wilson
from vla_jax.train import metrics
from vla_jax.types import UserError


def table(run: Path, errors: dict, trained: dict, untrained: dict) -> str:
    """One line per robot: held-out token accuracy, action error against the mean action, closed-loop success."""
    last = next((line for line in reversed(metrics.read(run)) if any(k.startswith("eval/") for k in line)), {})
    rows = [("robot", "token accuracy", "action error (mean action's)", "success (untrained)", "95 % interval")]
    for name, error in errors.items():
        measured = ", ".join(f"{v:.3f} {u} ({error['baseline'][u]:.3f})" for u, v in error["mae"].items())
        won, lost, n = sum(o.success for o in trained[name]), sum(o.success for o in untrained[name]), len(trained[name])
        low, high = wilson(won, n)
        rows.append(
            (name, f"{last.get(f'eval/{name}/accuracy', float('nan')):.2f}", measured, f"{won}/{n} ({lost}/{n})", f"{low:.0%} - {high:.0%}")
        )
    won, lost, n = (
        sum(f(o) for group in which.values() for o in group)
        for which, f in ((trained, lambda o: o.success), (untrained, lambda o: o.success), (trained, lambda o: 1))
    )
    low, high = wilson(won, n)
    rows.append(("all", "", "", f"{won}/{n} ({lost}/{n})", f"{low:.0%} - {high:.0%}"))
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(r, widths)).rstrip() for r in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def picture(run: Path, errors: dict, dims: dict[str, list[str]], trained: dict, out: Path) -> Path:
    """Loss curve; predicted against recorded actions of held-out frames (`dims` names them); a film strip per robot (a success where there is one)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, shots = list(errors), 7
    figure = plt.figure(figsize=(15, 4.2 + 2.3 * len(names)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[4.2, 2.3 * len(names)])
    axes = top.subplots(1, 1 + len(names))
    lines = [line for line in metrics.read(run) if "train/loss" in line]
    for name in names:
        key = f"train/dataset/{name}/nll"
        axes[0].plot([x["step"] for x in lines if key in x], [x[key] for x in lines if key in x], label=name)
    axes[0].set(title="training loss", xlabel="step", ylabel="nats per action token")
    axes[0].legend(fontsize=8)
    blur = np.random.default_rng(0)
    for axis, name in zip(axes[1:], names):
        recorded, predicted = errors[name]["first"]
        # every dimension over its own recorded range, and scattered by a hundredth, since many actions are the same few
        low, span = recorded.min(axis=0), np.maximum(np.ptp(recorded, axis=0), 1e-6)
        x, y = ((v - low) / span + blur.normal(0, 0.012, v.shape) for v in (recorded, predicted))
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=0)
        for d, dim in enumerate(dims[name]):
            axis.plot(x[:, d], y[:, d], "o", alpha=0.35, markersize=4, label=dim)
        axis.legend(fontsize=7)
        axis.set(title=f"{name}, held out", xlabel="recorded action / its range", ylabel="predicted")
    grid = bottom.subplots(len(names), shots, squeeze=False)
    for row, name in zip(grid, names):
        filmed = [o for o in trained[name] if o.frames]
        shown = next((o for o in filmed if o.success), filmed[0])
        for axis, at in zip(row, np.linspace(0, len(shown.frames) - 1, shots).astype(int)):
            axis.imshow(shown.frames[at])
            axis.set(xticks=[], yticks=[], xlabel=f"step {at}")
        row[0].set_title(f"{name}: {shown.prompt} - {'success' if shown.success else 'failure'}", loc="left", fontsize=10)
    figure.savefig(out, dpi=70)
    plt.close(figure)
    return out


def check_picture(name: str) -> None:
    """Raises: UserError when matplotlib is missing or cannot write such a file."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError("pictures need matplotlib: pip install 'vla-jax[plots]'") from e
    if Path(name).suffix[1:].lower() not in (known := Figure().canvas.get_supported_filetypes()):
        raise UserError(f"{name}: no picture format; there are {', '.join(sorted(known))}")


def tokens_picture(rows: list[dict], out: Path) -> Path:
    """Error against length of the tokenizers in rows of data.tokenization.measure, a panel per dataset."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["dataset"] for r in rows))
    columns = min(3, len(names))
    deep = -(-len(names) // columns)
    figure, axes = plt.subplots(deep, columns, figsize=(1.5 + 4.5 * columns, 1 + 3.6 * deep), layout="constrained", squeeze=False)
    kinds = {k: i for i, k in enumerate(sorted({_kind(r) for r in rows}, key=lambda k: (not k.startswith("fast"), len(k), k)))}
    for axis, name in zip(axes.flat, names):
        mine = [r for r in rows if r["dataset"] == name]
        for kind, i in kinds.items():
            labels: dict[tuple[float, float], list[str]] = {}
            for r in (r for r in mine if _kind(r) == kind):
                labels.setdefault((r["tokens"], r["rmse"]), []).append(r["tokenizer"].split()[1])
            if labels:
                x, y = zip(*sorted(labels))
                axis.plot(x, y, "o-" if "x" in kind else "s", color=f"C{i}", markersize=6, label=kind)
                for above, point in enumerate(sorted(labels)):  # above and below in turns: neighbours are near
                    axis.annotate(
                        "/".join(sorted(labels[point], key=int)),
                        point,
                        textcoords="offset points",
                        xytext=(0, -13 if above % 2 else 7),
                        fontsize=7,
                        ha="center",
                    )
        steps, dims = mine[0]["chunk"]
        axis.set(title=f"{name}: {steps} x {dims} numbers", xlabel="tokens a chunk", ylabel="rmse, normalised", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.margins(0.15)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "23457" else ""))
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=8)
    figure.suptitle("beside each point: ids asked for", fontsize=9)
    figure.savefig(out, dpi=90)
    plt.close(figure)
    return out


def _kind(row: dict) -> str:
    """`fast x10` of `fast 1024 x10`."""
    return " ".join(part for part in row["tokenizer"].split() if not part.isdigit() and part != "*")


def scaling_picture(reports: list[dict], out: Path) -> Path:
    """Of reports of compile-check: a chip's samples a second, its memory and what it receives, against the number of chips. Runs of one
    model on one kind of chip are joined. Raises: UserError when none fits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fit = [r for r in reports if r["fits"]]
    if not fit:
        raise UserError("none of the reports fits its chips: there is nothing to draw")
    series: dict[str, dict[int, dict]] = {}
    for r in fit:  # of several reports of the same run the last counts
        series.setdefault(f"{r['preset']} on {r['chip']}", {})[r["chips"]] = r
    lined = {name: of for name, of in series.items() if len(of) > 1}
    series = lined or series  # what was compiled for one number of chips says nothing about scaling
    fit = [r for of in series.values() for r in of.values()]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.3), layout="constrained")
    gib = 1 << 30
    for i, (name, by) in enumerate(sorted(series.items())):
        chips = sorted(by)
        line = lambda axis, values, style="o-", label=name, i=i, chips=chips: axis.plot(chips, values, style, color=f"C{i}", label=label)
        line(axes[0], [by[n]["samples_per_s"] / n for n in chips])
        line(axes[1], [by[n]["memory"]["total"] / by[n]["memory"]["hbm"] for n in chips])
        line(axes[1], [by[n]["memory"]["state"] / by[n]["memory"]["hbm"] for n in chips], "s:", None)
        per_chip = [by[n]["devices"] / n for n in chips]
        near, far = ([sum(two[w] for two in by[n]["collectives"].values()) * k / gib for n, k in zip(chips, per_chip)] for w in (0, 1))
        line(axes[2], near)
        if any(far):
            line(axes[2], far, "^--", f"{name}: from other slices")
    axes[0].set(
        title="predicted rate, rows a chip as they are",
        ylabel="samples/s a chip",
        ylim=(0, 1.2 * max(r["samples_per_s"] / r["chips"] for r in fit)),
    )
    axes[1].set(title="memory (dotted: parameters and optimizer)", ylabel="share of HBM", ylim=(0, 1.02))
    axes[2].set(title="received by a chip in a step", ylabel="GiB", ylim=(0, None))
    every = sorted({r["chips"] for r in fit})
    for axis in axes:
        axis.set(xlabel="chips", xscale="log", xticks=every, xticklabels=[f"{n:,}" for n in every])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[2].legend(fontsize=8)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    plt.close(figure)
    return out
