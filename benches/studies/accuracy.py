"""Fashion-MNIST: half the MACs of a small trained ResNet go, by every algorithm and torch-pruning, before and after an epoch.

    python benches/studies/accuracy.py [--seeds 0,1,2] [--only taylor,random] [--parts criteria recovery]

Writes docs/accuracy.md and docs/accuracy.json. Each row is kept in build/fashion as soon as it is there, so that a run that was
stopped goes on; after a change of the code `make clean` takes them away.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "shared"))

import fashion
import prunekit
from peers import CRITERIA, TorchPruning
from prunekit.training import distillation_loss

PAGE = Path(__file__).parent.parent.parent / "docs" / "accuracy.md"
CALIBRATION = 512  # training images that every criterion sees, each time it scores
BUDGET = 0.5  # of the MACs
STEPS = 10  # of equal factors, with new scores at each
DRAWS = 5  # of the random control, for each trained model
RATE, TUNED_BY = 0.03, 64  # of the epoch of fine-tuning, and its batch
BEST = ("group_norm", "taylor", "wanda")  # criteria that go on to the second table, with compensation
PEER = "torch-pruning "
ANEW = f"{BEST[0]}'s shape, trained anew"
RANKED = {"global": "across all axes", "axis": "within each axis"}
RECOVERED, AHEAD = 0.3, 40.0  # points of accuracy: what is promised of the second table
PARTS = ["criteria", "recovery", "anew"]
COLUMNS = (
    ("loss", "recalibrated", "loss", 3), ("accuracy", "recalibrated", "accuracy", 1),
    ("loss, not re-calibrated", "pruned", "loss", 3), ("accuracy, not re-calibrated", "pruned", "accuracy", 1),
)  # fmt: skip
TUNED = (
    ("pruned", "pruned", "accuracy", 2), ("re-calibrated", "recalibrated", "accuracy", 2),
    ("after one epoch", "finetuned", "accuracy", 2),
)  # fmt: skip
Found = Mapping[str, Sequence[prunekit.Outcome]]  # an outcome a seed, by method


@dataclass(frozen=True)
class Tested:
    """Mean loss, and accuracy in percent, of the test images."""

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Of a model in eval mode."""
        logits = torch.cat([model(x) for x in self.images.split(500)])
        right = (logits.argmax(1) == self.labels).float().mean()
        return {"loss": float(F.cross_entropy(logits, self.labels)), "accuracy": 100 * float(right)}


@dataclass(frozen=True)
class OneEpoch:
    """Fine-tuning, the same for all: the dense model's logits are learnt, by SGD whose rate rises and falls once."""

    images: Tensor = field(repr=False)
    teacher: nn.Module = field(repr=False)
    rate: float = RATE
    batch: int = TUNED_BY

    def __call__(self, model: nn.Module) -> None:
        """Train in place."""
        steps = -(-len(self.images) // self.batch)
        settings = {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
        optimizer = torch.optim.SGD(model.parameters(), self.rate, **settings)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=steps, pct_start=0.1)
        fashion.train(model, self.images, self.loss, optimizer, schedule, self.batch)

    def loss(self, logits: Tensor, x: Tensor, _: Tensor) -> Tensor:
        """Of a batch."""
        with torch.no_grad():
            wanted = self.teacher(x)
        return distillation_loss(logits, wanted, temperature=2.0)


@dataclass(frozen=True)
class Anew:
    """What an algorithm makes of a model, with fresh weights and trained as the model was: what its shape is good for."""

    algorithm: str
    seed: int
    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    steps: int = STEPS

    def __call__(self, model: nn.Module, example_inputs: Tensor) -> nn.Module:
        """By weights alone, in as many steps of equal factors as all."""
        small, dense = model, prunekit.profile(model, example_inputs, runs=1).macs
        for step in range(1, self.steps + 1):
            budget = {"macs": f"{int(dense * BUDGET ** (step / self.steps))}"}
            small = prunekit.prune(small, self.algorithm, example_inputs, budget=budget, scope="global")
        torch.manual_seed(self.seed)
        for module in small.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()
        with torch.enable_grad():
            fashion.teach(small, self.images, self.labels, repr(self))
        return small.eval()


@dataclass(frozen=True, eq=False)
class Seed:
    """A trained model and what all methods are given."""

    number: int
    dense: nn.Module
    data: list[tuple[Tensor, Tensor]]
    test: Tested
    epoch: OneEpoch
    anew: Anew

    @classmethod
    def of(cls, number: int) -> Seed:
        """Train, or read what was trained."""
        images, labels = fashion.read(fashion.FOLDER, "train")
        dense = fashion.trained(number, images, labels)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(number))
        data = [(images[i], labels[i]) for i in order[:CALIBRATION].split(fashion.BATCH)]
        return cls(
            number, dense, data, Tested(*fashion.read(fashion.FOLDER, "t10k")), OneEpoch(images, dense),
            Anew(BEST[0], number, images, labels),
        )  # fmt: skip

    def compared(
        self, methods: Mapping[str, Any], title: str, *, seed: int | None = None, **options: Any
    ) -> prunekit.Comparison:
        """All methods at the budget; the journal bears the title."""
        seed = self.number if seed is None else seed

        def listen(event: prunekit.Event) -> None:
            if event.stage == "compare":
                print(f"{title}, seed {self.number}: {event.message}", flush=True)

        return prunekit.compare(
            self.dense, methods, self.data, budget={"macs": BUDGET}, metric=self.test, example_inputs=fashion.IMAGE,
            steps=STEPS, runs=0, seed=seed, journal=fashion.BUILD / f"{title}-{self.number}-{seed}.rows", callbacks=[listen],
            **options,
        )  # fmt: skip

    def peer(self, criterion: str, scope: str, *, recalibrates: bool) -> TorchPruning:
        """torch-pruning with its defaults, in as many steps, if asked for re-calibrated in between like ours."""
        recalibrate = (lambda model: prunekit.recalibrate(model, self.data)) if recalibrates else None
        return TorchPruning(criterion, BUDGET, scope, STEPS, ("fc",), self.data, recalibrate)


def looks_at_data(name: str) -> bool:
    return name in prunekit.algorithms() and bool(prunekit.algorithms()[name].needs & ~prunekit.Needs.WEIGHTS)


def criteria(seeds: Sequence[Seed], scope: str, chosen: Iterable[str]) -> Found:
    """Algorithms with their defaults, and torch-pruning's, ranked in one scope."""
    found: dict[str, list[prunekit.Outcome]] = {}
    how, algorithms = f"{scope}-{STEPS}", prunekit.algorithms(second_names=False)
    for seed in seeds:
        methods: dict[str, Any] = {name: name for name in chosen if name in algorithms and name != "random"}
        for criterion in (c for c in CRITERIA if f"{PEER}{c}" in chosen):
            methods[f"{PEER}{criterion}"] = seed.peer(criterion, scope, recalibrates=True)
        rows = list(seed.compared(methods, f"criteria-{how}", scope=scope).rows)
        for draw in range(DRAWS if "random" in chosen else 0):
            number = DRAWS * seed.number + draw
            rows += seed.compared({"random": "random"}, f"random-{how}", seed=number, scope=scope).rows
        for row in rows:
            found.setdefault(row.method, []).append(row)
    return found


def recovery(seeds: Sequence[Seed], *, anew: bool) -> Found:
    """The best criteria with compensation, and torch-pruning's in both scopes, and what an epoch of training makes of them."""
    found: dict[str, list[prunekit.Outcome]] = {}
    for seed in seeds:
        ours = seed.compared(
            {name: name for name in BEST}, "recovery", scope="global", compensate="merge", finetune=seed.epoch
        ).rows
        peers = {
            f"{PEER}{c}, {'global' if s == 'global' else 'local'}": seed.peer(c, s, recalibrates=False)
            for c in CRITERIA
            for s in RANKED
        }
        theirs = seed.compared(peers, "recovery-peers", finetune=seed.epoch).rows
        fresh = seed.compared({ANEW: seed.anew}, "recovery-anew", finetune=seed.epoch).rows if anew else ()
        for row in (*ours, *theirs, *fresh):
            found.setdefault(row.method, []).append(row)
    return found


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def values(rows: Sequence[prunekit.Outcome], stage: str, metric: str) -> list[float]:
    return [row.metrics[stage][metric] for row in rows]


def mean(rows: Sequence[prunekit.Outcome], stage: str, metric: str) -> float:
    return statistics.mean(values(rows, stage, metric))


def failure(rows: Sequence[prunekit.Outcome]) -> str | None:
    return next((row.error for row in rows if row.error is not None), None)


def table(
    found: Found, dense: prunekit.Profile, columns: Sequence[tuple[str, str, str, int]], key: Callable[[str], float]
) -> list[str]:
    """A row a method, by the key; what failed comes last with its reason."""
    titles = [*(title for title, *_ in columns), "MACs", "parameters", "seconds"]
    lines = [f"| method | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    done = sorted((name for name in found if failure(found[name]) is None), key=key)
    for name in done:
        rows = found[name]
        shares = [
            f"{statistics.mean(getattr(r, what) for r in rows) / getattr(dense, what):.1%}" for what in ("macs", "params")
        ]
        cells = [spread(values(rows, stage, metric), digits) for _, stage, metric, digits in columns]
        shown = name if name.startswith((PEER, ANEW)) else f"`{name}`"
        lines.append(f"| {shown} | {' | '.join([*cells, *shares])} | {statistics.mean(r.seconds or 0 for r in rows):.1f} |")
    for name in found.keys() - set(done):
        lines.append(f"| `{name}` | {failure(found[name])} |" + " |" * (len(titles) - 1))
    return lines


def order_told(found: Found) -> str:
    """Whether what one expects holds: oracle ≤ taylor ≤ random, and all that look at data beat random."""
    loss = {name: mean(rows, "recalibrated", "loss") for name, rows in found.items() if failure(rows) is None}
    said = []
    if {"oracle", "taylor", "random"} <= loss.keys():
        said.append(f"oracle ≤ taylor ≤ random {told_of(loss['oracle'] <= loss['taylor'] <= loss['random'])}")
    if "random" in loss:
        data = [name for name in loss if looks_at_data(name)]
        worse = [name for name in data if loss[name] >= loss["random"]]
        said.append(
            f"not better than random: {', '.join(worse)}" if worse else f"all {len(data)} that look at data beat random"
        )
    return "; ".join(said)


def told_of(holds: bool) -> str:
    return "holds" if holds else "**does not hold**"


def recovery_told(found: Found, dense: float) -> list[str]:
    """What was promised of the second table."""
    ours = {name: rows for name, rows in found.items() if not name.startswith((PEER, ANEW)) and failure(rows) is None}
    peers = {name: rows for name, rows in found.items() if name.startswith(PEER) and failure(rows) is None}

    def best(of: Found, stage: str) -> str:
        return max(of, key=lambda name: mean(of[name], stage, "accuracy"))

    tuned, theirs = best(ours, "finetuned"), best(peers, "finetuned")
    a, b = (values(of[name], "finetuned", "accuracy") for of, name in ((ours, tuned), (peers, theirs)))
    raw, merged = best(peers, "pruned"), best(ours, "recalibrated")
    gap = mean(ours[merged], "recalibrated", "accuracy") - mean(peers[raw], "pruned", "accuracy")
    again = best(peers, "recalibrated")
    return [
        f"- after the epoch, our best, `{tuned}` ({spread(a, 2)}), is at least as accurate as torch-pruning's, {theirs} "
        f"({spread(b, 2)}): {told_of(statistics.mean(a) >= statistics.mean(b))}",
        f"- after the epoch, the dense model's accuracy ({dense:.2f}) is recovered within {RECOVERED} points: "
        f"{told_of(dense - statistics.mean(a) <= RECOVERED)} (short of it by {dense - statistics.mean(a):.2f})",
        f"- before any training, our best, `{merged}`, is at least {AHEAD:g} points above torch-pruning's, {raw}: "
        f"{told_of(gap >= AHEAD)} ({gap:.1f} points; {mean(ours[merged], 'recalibrated', 'accuracy'):.1f} against "
        f"{mean(peers[raw], 'pruned', 'accuracy'):.1f}, and against {mean(peers[again], 'recalibrated', 'accuracy'):.1f} of "
        f"{again} once prunekit has re-calibrated it)",
        *([anew_told(found[ANEW])] if ANEW in found else []),
    ]


def anew_told(rows: Sequence[prunekit.Outcome]) -> str:
    """What half the MACs are good for."""
    at_last, then = (spread(values(rows, stage, "accuracy"), 2) for stage in ("pruned", "finetuned"))
    return (
        f"- the same shape as `{BEST[0]}`'s with fresh weights, trained for {fashion.EPOCHS} epochs by labels as the dense "
        f"model was, gets to {at_last} (*pruned*), and after the epoch to {then}"
    )


def about(dense: prunekit.Profile, tests: Sequence[Mapping[str, float]]) -> str:
    """What was done, and to what."""
    losses, accuracies = ([test[name] for test in tests] for name in ("loss", "accuracy"))
    return (
        f"A ResNet of {dense.params:,} parameters, trained for {fashion.EPOCHS} epochs on Fashion-MNIST with {len(tests)} "
        f"seed(s): test loss {spread(losses, 3)}, accuracy {spread(accuracies, 2)} %. Then half of its MACs go, in {STEPS} "
        "steps of equal factors, scored anew and with the batch norms re-calibrated before each, by "
        f"`prunekit.compare`. Every method sees the same {CALIBRATION:,} training images; torch-pruning runs its own "
        "importance classes and steps, with the ratio found by bisection and the classifier ignored. Loss and accuracy are "
        "those on the 10,000 test images, mean ± standard deviation over the seeds; the random control is that of "
        f"{DRAWS} draws a seed."
    )


def about_recovery() -> str:
    """What was done besides."""
    return (
        "Accuracy in percent. prunekit ranks across all axes and merges what goes into what stays (`compensate='merge'`); "
        "torch-pruning runs as it is, and prunekit re-calibrates what comes out. Then all learn the dense model's logits for "
        f"one epoch, in batches of {TUNED_BY} with half of the images mirrored (SGD, momentum 0.9, a rate that rises to {RATE} "
        "and falls to zero)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="algorithms of the first tables, comma-separated; all by default")
    parser.add_argument("--scopes", nargs="*", default=["global"], choices=RANKED, help="of the first tables")
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    fashion.BUILD.mkdir(parents=True, exist_ok=True)
    seeds = [Seed.of(int(number)) for number in options.seeds.split(",")]
    everything = [*prunekit.algorithms(second_names=False), *(PEER + name for name in CRITERIA)]
    chosen = options.only.split(",") if options.only else everything
    tests = [seed.test(seed.dense) for seed in seeds]
    dense = prunekit.profile(seeds[0].dense, fashion.IMAGE, runs=1)
    versions = ", ".join(f"{p} {version(p)}" for p in ("prunekit-core", "torch", "torch-pruning"))
    command = shlex.join(["python", "benches/studies/accuracy.py", *sys.argv[1:]])
    page = ["# Accuracy", "", f"Written by `{command}` on {date.today()}: {versions}, Python {platform.python_version()}."]
    page += ["", about(dense, tests)]
    scopes = options.scopes if "criteria" in options.parts else []
    tables = {f"Criteria ranked {RANKED[scope]}, no weight trained": criteria(seeds, scope, chosen) for scope in scopes}
    for title, found in tables.items():
        key = lambda name, found=found: mean(found[name], "recalibrated", "loss")  # noqa: E731
        page += ["", f"## {title}", "", *table(found, dense, COLUMNS, key), "", f"- {order_told(found)}"]
    if "recovery" in options.parts:
        found = tables["recovery"] = recovery(seeds, anew="anew" in options.parts)
        key = lambda name: -mean(found[name], "finetuned", "accuracy")  # noqa: E731
        page += ["", "## With compensation, and after an epoch of training", "", about_recovery(), ""]
        page += [*table(found, dense, TUNED, key), ""]
        page += recovery_told(found, statistics.mean(test["accuracy"] for test in tests))
    print("\n".join(page))
    options.output.write_text("\n".join(page) + "\n")
    rows = {title: {name: [asdict(r) for r in each] for name, each in found.items()} for title, found in tables.items()}
    document = {"date": str(date.today()), "versions": versions, "seeds": [seed.number for seed in seeds], **rows}
    options.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
