"""The model card, README.md of an export: what it is, what it was trained on, how far, how well, and under which licences."""

from __future__ import annotations

from vla_jax import __version__, paths
from vla_jax.deploy.trained import Trained
from vla_jax.train import metrics

_LOADS = {
    "native": "from vla_jax.deploy.policy import Policy\n\npolicy = Policy.load(FOLDER, robot=NAME)\nprint(policy.spec())",
    "openpi": "openpi.models.model.restore_params(FOLDER / 'params')\nopenpi.shared.normalize.load(FOLDER / 'assets' / NAME)",
    "lerobot": "PI0FastPolicy.from_pretrained(FOLDER)  # lerobot.policies.pi0_fast",
    "hf": "transformers.PaliGemmaForConditionalGeneration.from_pretrained(FOLDER)",
}


def text(t: Trained, kind: str, dtype: str, notes: list[str]) -> str:
    """notes: what the format changes or leaves out, a sentence each."""
    c, licences = t.config, {r.card.licence or "unknown" for r in t.robots}
    number = sum(w.size for w in t.params.values())
    rows = [
        ("weights", f"{number:,} parameters, {'running mean (EMA)' if t.weights == 'ema' else 'as trained'}, {dtype}"),
        ("model", f"preset {c.model.preset}, {t.cfg.image_size} pixels, {t.cfg.vocab:,} rows of the embedding, expert {c.model.expert}"),
        ("tokens", f"layout {c.tokens.layout}, {c.tokens.action} with {t.layout.action.vocab_size} ids, state {c.tokens.state}"),
        *(("earlier tokens", f"{', '.join(g['robots'])} speak those that they were trained with") for g in t.meta.earlier),
        ("objective", c.train.objective + (f", adapters of rank {c.train.lora_rank} (merged here)" if c.train.lora_rank else "")),
        ("trained for", f"{t.step:,} of {c.train.steps:,} steps, {c.pack.rows} packed rows each" + _seen(t)),
        ("began with", c.model.init or "random weights"),
        ("mixture", f"{c.data.mixture} (fingerprint {t.meta.mixture})"),
        ("held out", f"{c.data.holdout:.0%} of the episodes"),
        ("trained by", f"vla_jax, commit {t.meta.commit or 'unknown'}"),
        ("written by", f"vla_jax {__version__}, commit {paths.commit()}"),
    ]
    out = [f"---\ntags: [robotics, vision-language-action, vla_jax]\npipeline_tag: robotics\nlicense: {_licence(licences)}\n---\n"]
    out += [
        f"# {t.run.resolve().name}, step {t.step}\n",
        f"A policy trained with vla_jax, in the format `{kind}`.\n",
        f"```python\n{_LOADS[kind]}\n```\n",
    ]
    out += ["| | |\n|---|---|", *(f"| {a} | {b} |" for a, b in rows), ""]
    if notes:
        out += ["## What this format changes\n", *(f"- {n}" for n in notes), ""]
    out += ["## Data\n", "Whoever uses the weights is bound by the licences of what they were trained on.\n"]
    out += ["| dataset | robot | control | chunk | cameras | frames | epochs | licence | source |\n|---|---|---|---|---|---|---|---|---|"]
    epochs = next((x for x in reversed(_lines(t)) if any(k.startswith("train/epochs/") for k in x)), {})
    for r in t.robots:
        card = r.card
        out.append(
            f"| {card.name} {card.version} | {_cell(card.robot)} | {card.control_hz:g} Hz | {r.steps} steps | {', '.join(r.views)} | "
            f"{r.stats['action'].count:,} | {epochs.get(f'train/epochs/{card.name}', 0):.3g} | {_cell(card.licence) or 'unknown'} | {_cell(card.source)} |"
        )
    out.append("")
    for r in t.robots:
        dims = lambda spec: ", ".join(f"{d.name} ({d.unit}, {d.frame}, {d.kind})" for d in spec.dims) or "none"
        out += [f"**{r.card.name}**: state {dims(r.card.state)}; action {dims(r.card.action)}. {_cell(r.card.citation)}\n"]
    out += ["## Metrics\n", *_metrics(t), ""]
    return "\n".join(out)


def _licence(found: set[str]) -> str:
    known = {"cc-by-4.0", "apache-2.0", "mit", "cc0-1.0", "bsd-3-clause"}
    one = next(iter(found)).lower().replace(" ", "-") if len(found) == 1 else ""
    return one if one in known else "other"


def _cell(words: str) -> str:
    return " ".join(words.replace("|", "\\|").split())


def _lines(t: Trained) -> list[dict]:
    return [line for line in metrics.read(t.run) if line["step"] <= t.step]


def _seen(t: Trained) -> str:
    seen = next((x["train/seen/samples"] for x in reversed(_lines(t)) if "train/seen/samples" in x), None)
    return f", {seen:,} samples" if seen else ""


def _metrics(t: Trained) -> list[str]:
    """The last ones that were logged up to this step: of training, and on held-out episodes."""
    out = []
    for name, wanted in (("training", ("train/loss", "train/dataset/")), ("held-out episodes", ("eval/",))):
        for line in reversed(_lines(t)):
            if found := {
                k: v for k, v in line.items() if k.startswith(wanted) and not k.endswith("/targets") and isinstance(v, (int, float))
            }:
                out += [
                    f"On {name}, logged at step {line['step']}:\n",
                    "| | |\n|---|---|",
                    *(f"| {k} | {v:.4g} |" for k, v in sorted(found.items())),
                    "",
                ]
                break
    return out or ["None were logged."]
