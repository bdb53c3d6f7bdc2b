"""Several objectives on one labelled set at equal CPU-minutes, and what the encoder of MoCo v3 is
good for: kNN, linear probe, fine-tuning, beside the same encoder trained with labels.

    python -m benchmarks.datasets fashion SRC /tmp/fashion
    fastmoco data pack /tmp/fashion/train /tmp/train && fastmoco data pack /tmp/fashion/test /tmp/test
    python -m benchmarks.equal_minutes '/tmp/train/*.tar' '/tmp/test/*.tar' OUT --minutes 5

Every run is a command of `fastmoco` in a process of its own with one thread. Two short runs of each
recipe give the CPU-seconds of an epoch, and these the number of epochs that fit into the minutes.
The columns have the CPU-seconds that a whole run has taken. A run or an evaluation that has ended
already in OUT is not repeated. The evaluations need `moco_v3` among the `--methods`. OUT/table.md is
the result, OUT/table.json the same for programs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.cases.methods import methods_of
from benchmarks.kept_runs import once
from fastmoco.run.folder import RunFolder

RECIPES = methods_of("fashion")
"""Recipe by method: all that learn without labels."""
EVALUATED = "moco_v3"
"""The method whose encoder is evaluated further."""
SUPERVISED = "supervised_nano7_e12_b256"
SMALL_IMAGES = (
    *("--batch", "256", "--lr", "3e-3", "--mixup", "0", "--cutmix", "0"),
    *("--layer-decay", "1", "--drop-path", "0"),
)
"""Options of the fine-tuning in place of the defaults, which are for ViT-B on ImageNet."""
PROBES = (0.2, 0.7)
"""Epochs of the two runs that measure an epoch."""
BANK = 10_000
"""Images of the bank of kNN."""


class Runs:
    """Runs on one pair of sets, each done once.

    Args:
        train: shards of the training set.
        test: shards of the held-out set.
        labelled: shards whose labels a probe, a fine-tuning and a supervised run may use.
        out: folder of runs and results.
    """

    def __init__(self, train: str, test: str, labelled: str, out: Path) -> None:
        self.train, self.test, self.labelled, self.out = train, test, labelled, out

    def once(self, name: str, *words: str) -> dict[str, Any]:
        """The result of a command of `fastmoco` (`kept_runs.once`)."""
        return once(self.out, name, "-m", "fastmoco", *words)

    def train_on(
        self, shards: str, name: str, recipe: str, epochs: float, *more: str
    ) -> dict[str, Any]:
        """A run of a recipe, whole or continued."""
        return self.once(
            name,
            "train",
            recipe,
            *("--data.shards", shards, "--threads", "1", "--data.threads", "1"),
            *("--epochs", f"{epochs:.4g}", "--optim.warmup-epochs", f"{min(1, epochs / 10):.4g}"),
            *("--out", str(self.out / "runs" / name)),
            *more,
        )

    def epochs_for(
        self, shards: str, label: str, recipe: str, minutes: float, probes: Sequence[float] = PROBES
    ) -> float:
        """Epochs of a recipe that take these CPU-minutes, without starting and evaluation."""
        costs = [
            self.train_on(
                shards, f"{label}-probe{epochs}", recipe, epochs, "--knn.every-epochs", "0"
            )
            for epochs in probes
        ]
        each = (costs[1]["cpu_s"] - costs[0]["cpu_s"]) / (probes[1] - probes[0])
        return float(minutes * 60 / each)

    def knn(self, name: str) -> tuple[float, float]:
        """kNN accuracy of a run before and after the training."""
        history = RunFolder(self.out / "runs" / name).read_metric("knn")
        return history[0][1], history[-1][1]

    def evaluate(self, protocol: str, run: str, *more: str) -> dict[str, Any]:
        """`fastmoco eval PROTOCOL` of a run."""
        name = f"{run}-{protocol}{''.join(word for word in more if word.startswith('--'))}"
        sets = ("--train", self.labelled, "--test", self.test)
        words = (*sets, *more, *(() if "--json" in more else ("--json",)))
        return self.once(name, "eval", protocol, str(self.out / "runs" / run), *words)


def measure(
    runs: Runs, methods: Sequence[str], minutes: float, seeds: Sequence[int], epochs: float
) -> list[dict[str, Any]]:
    """One row for each run or evaluation: what, seed, figures and CPU-seconds."""
    rows: list[dict[str, Any]] = []
    watch = ("--knn.test-shards", runs.test, "--knn.max-train-images", str(BANK))
    for method in methods:
        recipe = RECIPES[method]
        fitting = runs.epochs_for(runs.train, method, recipe, minutes)
        for seed in seeds:
            name = f"{method}-{seed}"
            more = ("--seed", str(seed), "--knn.every-epochs", "1000", *watch)
            done = runs.train_on(runs.train, name, recipe, fitting, *more)
            before, after = runs.knn(name)
            rows.append(
                {
                    "what": method,
                    "seed": seed,
                    "epochs": fitting,
                    "before": before,
                    "knn": after,
                    "cpu_s": done["cpu_s"],
                }
            )

    # What the encoder of MoCo v3 is good for, beside the same encoder trained with labels.
    if EVALUATED not in methods:
        return rows
    fitting = runs.epochs_for(runs.labelled, "supervised", SUPERVISED, minutes, (1, 4))
    for seed in seeds:
        run = f"{EVALUATED}-{seed}"
        folder = runs.out / "runs" / f"finetune-{seed}"
        tuned = ("--out", str(folder), "--epochs", f"{epochs:g}", *SMALL_IMAGES)
        own = ("--seed", str(seed), "--accuracy.test-shards", runs.test)
        for what, done, key in (
            ("linear probe on features", runs.evaluate("linear", run, "--fast", "--json"), "top1"),
            ("fine-tuning", runs.evaluate("finetune", run, *tuned), "top1"),
            (
                "trained with labels",
                runs.train_on(runs.labelled, f"supervised-{seed}", SUPERVISED, fitting, *own),
                "",
            ),
        ):
            if key:
                figure = done["result"][key]
            else:
                own_run = RunFolder(runs.out / "runs" / f"supervised-{seed}")
                figure = own_run.read_metric("top1")[-1][1]
            rows.append({"what": what, "seed": seed, "top1": figure, "cpu_s": done["cpu_s"]})
    return rows


def table(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> str:
    """The rows as Markdown, the seeds beside each other."""
    lines = [
        f"| | figure | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | CPU-seconds |",
        "|---|---|" + "---|" * (len(seeds) + 2),
    ]
    for what in dict.fromkeys(row["what"] for row in rows):
        own = [row for row in rows if row["what"] == what]
        seconds = f"{mean(row['cpu_s'] for row in own):.0f}"
        if "knn" in own[0]:
            cells = " | ".join(f"{row['before']:.1%} -> {row['knn']:.1%}" for row in own)
            gain = mean(row["knn"] - row["before"] for row in own)
            title = f"kNN, random -> after {own[0]['epochs']:.1f} epochs"
            lines.append(f"| {what} | {title} | {cells} | {100 * gain:+.1f} | {seconds} |")
        else:
            cells = " | ".join(f"{row['top1']:.1%}" for row in own)
            lines.append(
                f"| {what} | top-1 | {cells} | {mean(row['top1'] for row in own):.1%} | {seconds} |"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, print the table and write it; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.equal_minutes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("train", help="labelled shards to train on")
    parser.add_argument("test", help="held-out labelled shards")
    parser.add_argument("--labelled", help="part of the training set whose labels are used")
    parser.add_argument("out", type=Path, help="folder of runs and results")
    parser.add_argument("--minutes", type=float, default=5, help="CPU-minutes of training")
    parser.add_argument("--methods", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=float, default=5, help="of the fine-tuning")
    arguments = parser.parse_args(argv)
    labelled = arguments.labelled or arguments.train
    runs = Runs(arguments.train, arguments.test, labelled, arguments.out)
    rows = measure(runs, arguments.methods, arguments.minutes, arguments.seeds, arguments.epochs)
    text = table(rows, arguments.seeds)
    (arguments.out / "table.json").write_text(json.dumps(rows, indent=1))
    (arguments.out / "table.md").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
