"""The study's lines as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vla_jax.study import plan

_HEADS = ("arm", "condition", "robot", "success", "95 % interval", "progress", "steps to success", "training s (CPU s)", "ms an action")


def newest(lines: Iterable[dict]) -> list[dict]:
    """Of each arm and condition the last line, in the plan's order of arms: they are measured two at a time."""
    order = {arm.name: i for i, arm in enumerate(plan.arms(plan.Scale()))}
    last = {(line["arm"], line["condition"], line["robot"]): line for line in lines}
    return sorted(last.values(), key=lambda line: order.get(line["arm"], len(order)))


def pooled(lines: list[dict]) -> list[dict]:
    """One line for each arm and condition that several robots share: successes added up, with Wilson's interval."""
    from vla_jax.deploy.rollout import wilson

    out = []
    for arm, condition in dict.fromkeys((line["arm"], line["condition"]) for line in lines):
        mine = [line for line in lines if (line["arm"], line["condition"]) == (arm, condition)]
        if len(mine) > 1:
            won, n = sum(line["successes"] for line in mine), sum(line["trials"] for line in mine)
            half = sum(line["progress_half"] ** 2 * line["trials"] ** 2 for line in mine) ** 0.5 / n
            progress = sum(line["progress"] * line["trials"] for line in mine) / n
            low, high = wilson(won, n)
            out.append(
                mine[0]
                | {"robot": "all", "successes": won, "trials": n, "low": low, "high": high, "steps_to_success": None}
                | {"progress": progress, "progress_half": half, "action_s": None}
            )
    return out


def table(lines: Iterable[dict]) -> str:
    """Markdown; the pooled line of several robots behind them."""
    every = newest(lines)
    rows = []
    for line in [*every, *pooled(every)]:
        robot = line["robot"].removeprefix("tabletop_")
        success, interval = f"{line['successes']}/{line['trials']}", f"{line['low']:.0%} - {line['high']:.0%}"
        progress = f"{line['progress']:.2f} +- {line['progress_half']:.2f}"
        steps = f"{line['steps_to_success']:.0f}" if line["steps_to_success"] else ""
        cost = f"{line['train_s']:.0f} ({line['train_cpu_s']:.0f})" if line["train_s"] else ""
        ms = f"{1000 * line['action_s']:.1f}" if line["action_s"] else ""
        rows.append((line["arm"], line["condition"], robot, success, interval, progress, steps, cost, ms))
    order = {arm: i for i, arm in enumerate(dict.fromkeys(r[0] for r in rows))}
    rows.sort(key=lambda r: order[r[0]])
    return "\n".join("| " + " | ".join(row) + " |" for row in (_HEADS, ["---"] * len(_HEADS), *rows))


def picture(lines: Iterable[dict], out: Path) -> Path:
    """Success and progress against demonstrations, pretrained and from scratch, and the heads beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    every = newest(lines)
    rate = lambda x: (x["successes"] / x["trials"], x["low"], x["high"])
    share = lambda x: (x["progress"], x["progress"] - x["progress_half"], x["progress"] + x["progress_half"])
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "study", "font.size": 8}):
        figure, axes = plt.subplots(2, 3, figsize=(9.5, 5), layout="constrained", sharey="row")
        for row, (measure, called) in zip(axes, ((rate, "success"), (share, "progress"))):
            for axis, target in zip(row, ("task", "robot")):
                for i, (label, begins) in enumerate((("pretrained", "pretrain-fast"), ("from scratch", ""))):
                    mine = [
                        x
                        for x in every
                        if x["condition"] == target and x["begins"] == begins and x["arm"].endswith(("-pretrained", "-scratch"))
                    ]
                    _bars(axis, [x["demonstrations"] * (1 + 0.05 * i) for x in mine], [measure(x) for x in mine], f"C{i}", label, "o-")
                for x in (x for x in every if x["arm"].startswith(f"{target}-") and x["arm"].endswith("-long")):
                    _bars(axis, [x["demonstrations"] * 1.12], [measure(x)], "C3", "from scratch, as many steps as both", "s")
                for x in (x for x in every if x["condition"] == "task, no demonstration" and target == "task"):
                    axis.axhline(measure(x)[0], color="0.6", linestyle=":", label="pretrained, no demonstration")
                axis.set(title=f"new {target}: {called}", xlabel="demonstrations", xscale="log")
                sizes = sorted({x["demonstrations"] for x in every if x["target"] == target})
                axis.set_xticks(sizes, [str(n) for n in sizes])
                axis.minorticks_off()
                axis.grid(alpha=0.3)
            groups = [(h, c) for h in ("fast", "bins", "flow") for c in ("seen instruction",)] + [
                ("fast", "held-out instruction"),
                ("fast", "held-out camera"),
            ]
            labels = ["FAST", "bins", "flow", "FAST,\nother\nwords", "FAST,\nother\ncamera"]
            for at, (head, condition) in enumerate(groups):
                mine = [x for x in every if (x["arm"], x["condition"]) == (f"pretrain-{head}", condition)]
                _bars(row[2], [at], [measure(x) for x in pooled(mine)], f"C{2 + (at > 2)}", None, "o")
            row[2].set(title=f"three robots, pretrained: {called}")
            row[2].set_xticks(range(len(groups)), labels)
            row[2].grid(alpha=0.3)
            row[0].set_ylim(0 if measure is rate else None, None)
        axes[0, 1].legend(*axes[0, 0].get_legend_handles_labels(), loc="upper left")  # where there is room
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
        plt.close(figure)
    return out


def _bars(axis, x, measured, colour, label, style) -> None:
    if measured:
        middle, low, high = zip(*measured)
        error = [[m - a for m, a in zip(middle, low)], [b - m for m, b in zip(middle, high)]]
        axis.errorbar(x[: len(middle)], middle, error, fmt=style, color=colour, label=label, capsize=3)
