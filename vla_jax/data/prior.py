"""What a run begins with: the exported policy that `model.init` names, as far as the data side needs it.

A policy brings its tokenizers and, for each robot, a card and statistics. Those are kept: tokens and normalised numbers go on to mean what
the weights have learned. Which robots of before the new policy can still drive is decided here, too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from vla_jax import config as configs
from vla_jax.data import cards, sample, stats
from vla_jax.data.cards import DatasetCard
from vla_jax.tokens import files
from vla_jax.tokens.text import TextTokenizer
from vla_jax.types import ActionTokenizer, Stats, UserError

FORMAT = "vla_jax.policy.2"  # as deploy/export.py writes it
NAMES = ("policy.json", "action_tokenizer.json", "text.model")
_WEIGHTS = ("policy.json", "params", "_METADATA")  # of an export, an import, and the weights of one
_HEADS = {"tokens": {"tokens"}, "flow": {"flow"}, "both": {"tokens", "flow"}}


@dataclasses.dataclass(frozen=True)
class Prior:
    """robots: {name: (raw card, raw statistics)}; vocab: rows of the embedding; state_dim: width of the projected
    state, 0 without one; behind: ids of tokenizers that were there before `action`; earlier: those of them that robots still speak, as JSON:
    {tokenizer, behind, robots: names} each; raw: the files, to be kept."""

    config: configs.Config
    step: int
    vocab: int
    state_dim: int
    robots: dict[str, tuple[dict, dict]]
    text: TextTokenizer
    action: ActionTokenizer
    behind: int
    earlier: list[dict]
    raw: dict[str, bytes]

    def statistics(self, card: DatasetCard) -> dict[str, Stats] | None:
        """Those of a robot that is known already, None of a new one. Raises: UserError when its numbers mean something else now."""
        if card.name not in self.robots:
            return None
        raw, numbers = self.robots[card.name]
        old = cards.from_dict(raw, where=f"model.init, {card.name}")
        for what, before, now in (
            ("control_hz", old.control_hz, card.control_hz),
            ("state", old.state.dims, card.state.dims),
            ("action", old.action.dims, card.action.dims),
        ):
            if before != now:
                said = lambda x: ", ".join(f"{d.name} {d.unit} {d.frame} {d.kind}" for d in x) if isinstance(x, tuple) else f"{x:g}"
                raise UserError(
                    f"{card.name} is known to model.init with another {what}: {said(before)}; its card says {said(now)}. Give the card a name of its "
                    "own if it is another robot, or set --config.data.refit_stats=true to take its statistics from the new data."
                )
        return stats.from_json(numbers)

    def carried(
        self, config: configs.Config, mixture: tuple[str, ...], action: ActionTokenizer
    ) -> tuple[list[tuple[dict, dict]], dict[str, str]]:
        """Robots that the mixture does not have -> ([(card, statistics)] of those that act as before, weights aside, {name: why not}).
        What they would be asked with must be what they were trained with."""
        keep, lost, old = [], {}, self.config
        reasons = []
        if config.tokens.layout == "openpi" and action != self.action:
            reasons.append("the action tokenizer is another one, and tokens.layout=openpi has ids for one only")
        for group, key in (("data", "image_size"), ("data", "resize"), ("tokens", "describe"), ("tokens", "limit")):
            before, now = (getattr(getattr(c, group), key) for c in (old, config))
            reasons += [f"{group}.{key} {before} -> {now}"] if before != now else []
        if untrained := _HEADS[config.train.objective] - _HEADS[old.train.objective]:
            reasons.append(f"it was not trained for {' and '.join(untrained)} (train.objective)")
        for name, (raw, numbers) in self.robots.items():
            if name in mixture:
                continue
            card, why = cards.from_dict(raw, where=f"model.init, {name}"), list(reasons)
            views = [[v for v in c.data.views if v in card.views] for c in (old, config)]
            steps = [sample.chunk_steps(card.control_hz, c.data.chunk_s, c.data.max_chunk) for c in (old, config)]
            why += [f"data.views {views[0]} -> {views[1]}"] if views[0] != views[1] else []
            why += [f"a chunk has {steps[1]} steps instead of {steps[0]}"] if steps[0] != steps[1] else []
            if why:
                lost[name] = "; ".join(why)
            else:
                keep.append((raw, numbers))
        return keep, lost

    def ids_behind(self, config: configs.Config, action: ActionTokenizer) -> int:
        """How many ids of earlier tokenizers lie before those of `action`: another one than the policy's gets ids of its own."""
        if config.tokens.layout == "openpi":
            return 0
        return self.behind + (0 if action == self.action else self.action.vocab_size)

    def spoken(self, names: list[str], action: ActionTokenizer) -> list[dict]:
        """As `earlier`, for those robots of before in a run whose own tokenizer is `action`."""
        groups = [{**g, "robots": [n for n in names if n in g["robots"]]} for g in self.earlier]
        if action != self.action:
            own = [n for n in names if not any(n in g["robots"] for g in groups)]
            groups.append({"tokenizer": files.to_json(self.action), "behind": self.behind, "robots": own})
        return [g for g in groups if g["robots"]]

    def check(self, config: configs.Config) -> None:
        """Raises: UserError for a setting that must be the policy's."""
        old, wrong = self.config, []
        for key in ("model.preset", "tokens.layout", "tokens.state", "data.history"):
            group, name = key.split(".")
            before, now = (getattr(getattr(c, group), name) for c in (old, config))
            wrong += [f"{key} is {now}, there {before}"] if before != now else []
        if "none" not in (old.model.expert, config.model.expert):
            if old.model.expert != config.model.expert:
                wrong.append(f"model.expert is {config.model.expert}, there {old.model.expert}")
            if old.model.expert_dims > config.model.expert_dims:
                wrong.append(f"model.expert_dims is {config.model.expert_dims}, there {old.model.expert_dims}; it can only grow")
        if wrong:
            raise UserError(f"model.init {config.model.init} is a policy of another kind: {'; '.join(wrong)}. Set them as they are there.")

    def keep(self, folder) -> None:
        """The small files, likewise, so that the run goes on without the policy. `load` reads them."""
        (folder / "robots").mkdir(parents=True, exist_ok=True)
        for name, content in self.raw.items():
            (folder / name).write_bytes(content)
        (folder / "SHA256SUMS").write_text("".join(f"{hashlib.sha256(c).hexdigest()}  {n}\n" for n, c in self.raw.items()))


def _check_there(folder: Path) -> None:
    """Raises: UserError unless it may be what model.init takes. Before a run writes anything: what a mistyped name leaves in a workdir would
    be in the way of the right one."""
    found = "does not exist" if not folder.exists() else "" if folder.is_dir() else "is a file"
    if not found and not any((folder / name).exists() for name in _WEIGHTS):
        found = f"holds no weights (none of {', '.join(_WEIGHTS)})"
    if found:
        raise UserError(
            f"model.init {folder} {found}. Give a folder that `vla-jax export` wrote (a policy) or `vla-jax import` (weights of others), or "
            "leave it empty to begin with random weights."
        )


def fingerprint(name: str) -> str:
    """Of what model.init names: of the checksums that an export has; of weights of others the names and sizes of all files. "" where nothing is there."""
    folder = Path(name).expanduser()
    if (folder / "SHA256SUMS").is_file():
        return hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest()
    files_of = sorted((p.relative_to(folder).as_posix(), p.stat().st_size) for p in folder.rglob("*") if p.is_file())
    return hashlib.sha256(json.dumps(files_of).encode()).hexdigest() if files_of else ""


def load(folder) -> Prior | None:
    """folder: a name, or a path of any kind that reads as pathlib's do (a workdir may be in a bucket). None where it is no exported
    policy: weights of others bring no robots. Raises: UserError for a damaged one, and for a name under which there is neither."""
    if isinstance(folder, str):
        folder = Path(folder).expanduser()
        _check_there(folder)
    if not (folder / "policy.json").is_file():
        return None
    try:
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in (folder / "SHA256SUMS").read_text().splitlines())}
        robots = [name for name in sums if name.startswith("robots/") and name.count("/") == 1 and name.endswith(".json")]
        raw = {name: (folder / name).read_bytes() for name in (*NAMES, *robots)}
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"model.init {folder} is no whole exported policy: {e}") from e
    for name, content in raw.items():
        if sums.get(name) != hashlib.sha256(content).hexdigest():
            raise UserError(f"{folder / name} is damaged: its SHA-256 differs from SHA256SUMS. Copy the folder again.")
    try:
        body = json.loads(raw["policy.json"])
        if body["format"] != FORMAT:
            raise UserError(f"model.init {folder} has format {str(body['format'])[:80]!r}, this version reads {FORMAT!r}")
        tokenizer = files.from_json(json.loads(raw["action_tokenizer.json"]), where=str(folder / "action_tokenizer.json"))
        told = {name: json.loads(raw[f"robots/{name}.json"]) for name in body["robots"]}
        known = {name: (of["card"], of["stats"]) for name, of in told.items()}
        earlier = [{"tokenizer": g["tokenizer"], "behind": int(g["behind"]), "robots": list(g["robots"])} for g in body["earlier"]]
        for g in earlier:
            files.from_json(g["tokenizer"], where=str(folder / "policy.json"))
        return Prior(
            config=configs.from_dict(body["config"], where=str(folder / "policy.json")),
            step=int(body["step"]),
            vocab=int(body["vocab"]),
            state_dim=int(body["state_dim"]),
            robots=known,
            text=TextTokenizer(raw["text.model"]),
            action=tokenizer,
            behind=int(body["behind"]),
            earlier=earlier,
            raw=raw,
        )
    except files.ODD as e:
        raise UserError(f"model.init {folder} is no exported policy: {type(e).__name__}: {str(e)[:200]}") from e
