"""Did you mean: options, commands and recipes that are near to a word, by meaning and by spelling."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from fastmoco.cli.options import Described, Option

MEANINGS: dict[str, str] = {
    "optim.lr": "lr learning-rate base-lr blr init-lr max-lr peak-lr",
    "global_batch_size": "batch-size bs b batch total-batch-size train-batch-size batchsize "
    "batch-size-per-gpu per-gpu-batch-size micro-batch-size",
    "epochs": "epoch e num-epochs n-epochs max-epochs max-epoch steps max-steps iterations iters",
    "optim.weight_decay": "weight-decay wd decay l2",
    "optim.warmup_epochs": "warmup warmup-epochs warmup-steps warm-up warmup-epoch",
    "objective.ema_momentum": "momentum m ema ema-momentum moco-m ema-decay momentum-teacher "
    "momentum-target momentum-encoder",
    "objective.ema_schedule": "moco-m-cos ema-cosine momentum-schedule",
    "objective.temperature": "temperature tau temp t moco-t",
    "data.threads": "workers num-workers j threads num-threads loader-workers dataloader-workers",
    "data.images": "images image-folder imagefolder data data-path data-dir dataset train-dir root",
    "data.shards": "shards data data-path data-dir dataset train-data train-dir datadir root "
    "imagenet data-root",
    "out": "output output-dir out-dir outdir save-dir save-path o logdir log-dir exp-dir work-dir "
    "checkpoint-dir ckpt-dir dir run run-dir",
    "device": "device gpu cuda cpu mps accelerator",
    "gpus": "gpu gpus num-gpus ngpus n-gpus world-size nproc nproc-per-node devices processes "
    "multiprocessing-distributed ngpu",
    "precision": "amp fp16 bf16 fp32 half mixed-precision use-amp float16 bfloat16 use-fp16 dtype",
    "model.architecture": "arch a model backbone encoder architecture network net",
    "model.image_size": "img-size image-size input-size imsize resolution img-sz size crop-size",
    "model.patch_size": "patch-size patch",
    "model.init": "pretrained weights init init-from pretrained-weights finetune load-from "
    "initial-weights checkpoint ckpt",
    "data.view1.crop_scale": "crop-min crop-scale min-scale crop min-crop global-crops-scale scale",
    "data.view2.crop_scale": "crop-min crop-scale min-scale crop min-crop global-crops-scale scale",
    "log_every_steps": "print-freq p log-freq log-interval log-every log-steps print-every",
    "checkpoint.every_minutes": "save-freq save-every ckpt-freq saveckp-freq save-interval "
    "checkpoint-every",
    "checkpoint.every_steps": "save-steps checkpoint-steps save-every-steps",
    "optim.name": "optimizer opt optim",
    "optim.clip_norm": "clip-grad grad-clip clip max-grad-norm clip-grad-norm",
    "batch.chunk": "accum-iter accumulate grad-accum gradient-accumulation-steps accum micro-batch",
    "model.checkpointing": "gradient-checkpointing checkpointing grad-checkpointing",
    "model.projection_dim": "moco-dim out-dim proj-dim dim feature-dim embedding-dim",
    "model.hidden_dim": "moco-mlp-dim mlp-dim hidden hidden-size",
    "knn.test_shards": "val val-data test test-data eval-data val-path val-dir val-shards",
    "knn.k": "nb-knn knn-k neighbors neighbours num-neighbors",
    "parallel.strategy": "fsdp ddp strategy distributed dist zero",
    "model.compile": "compile torch-compile",
    "seed": "seed random-seed manual-seed",
    "workers": "num-workers j threads num-threads processes",
    "max_side": "size image-size resize max-size img-size",
    "overwrite": "force f exist-ok",
    "test": "val val-data test-shards",
    "train": "train-data train-shards data",
    "k": "nb-knn neighbors neighbours num-neighbors",
}
"""Words of well-known scripts for each option."""
NOTES = {
    "resume": "the same command again continues the run in --out",
    "start-epoch": "the same command again continues the run in --out",
    "wandb": "--trackers.use wandb sends there what metrics.jsonl in the folder --out contains",
    "use-wandb": "--trackers.use wandb sends there what metrics.jsonl in the folder --out contains",
    "wandb-project": "--trackers.project NAME",
    "mlflow": "--trackers.use mlflow",
    "trackio": "--trackers.use trackio",
    "tensorboard": "its files are in the folder --out if it is installed",
    "rank": "--gpus N starts the processes of this machine",
    "local-rank": "--gpus N starts the processes of this machine",
    "dist-url": "--gpus N starts the processes of this machine",
    "dist-backend": "--gpus N starts the processes of this machine",
    "config": "name the file in place of a recipe",
    "cfg": "name the file in place of a recipe",
    "stop-grad-conv1": "the patch embedding of every ViT is fixed",
    "cos": "every schedule is a cosine after the warm-up",
}
"""Words of well-known scripts without an option, and what to do instead."""
COMMAND_MEANINGS = {
    "train": "pretrain pre-train run fit start resume continue launch main",
    "recipes": "models list-recipes archs recipe ls",
    "print-config": "config show-config cfg show print",
    "plan": "memory estimate flops",
    "profile": "trace bottleneck timing perf",
    "quickstart": "demo example tutorial try",
    "runs": "ls list status ps experiments jobs",
    "data pack": "pack prepare convert make-shards shard create write",
    "data index": "index",
    "data check": "check validate scan clean verify",
    "data stats": "stats statistics info describe inspect",
    "data views": "views preview augment augmentations visualize",
    "data sample": "sample download digits",
    "checkpoint list": "checkpoints ls-checkpoints list",
    "checkpoint verify": "verify",
    "checkpoint consolidate": "consolidate merge save-encoder",
    "export": "convert-checkpoint to-onnx onnx timm huggingface hf torchvision",
    "eval knn": "knn test evaluate eval-knn",
    "help": "man usage",
}
"""Words for each command."""


SMALL_CROPS = "data.more-views."
"""How the options of small crops begin."""


def plain(word: str) -> str:
    """A word of an option without its dashes and value, with hyphens."""
    return word.partition("=")[0].lstrip("-").replace("_", "-").lower()


def near_options(word: str, described: Described, *, most: int = 3) -> list[Option]:
    """Options that a word may mean, the likeliest first."""
    wanted = plain(word)
    options = [option for option in described.options if not option.positional]
    names = {option: plain(option.flag) for option in options}

    # The last parts of an option's name, e.g. `--view1.size` or `--lr`.
    found = [o for o, name in names.items() if name == wanted or name.endswith(f".{wanted}")]
    # An option under the name of another group: `--optim.epochs`.
    last = wanted.rpartition(".")[2]
    if not found and last != wanted and not wanted.startswith(SMALL_CROPS):
        found = [o for o, name in names.items() if name == last or name.endswith(f".{last}")]
    # The number of a group of small crops that a recipe has not.
    if wanted.startswith(SMALL_CROPS):
        crops = [o for o, name in names.items() if name.startswith(SMALL_CROPS)]
        found += [o for o in crops if names[o].rpartition(".")[2] == last]
    # Words of other scripts, also with the wrong group: `--optim.learning-rate`.
    for key in (wanted, wanted.rpartition(".")[2]):
        meant = [o for o in options if key in MEANINGS.get(o.name, "").split()]
        found = [*meant, *found] if key == wanted and meant else [*found, *meant]
        if found:
            break
    # Spelling, of whole names and of last parts.
    if not found:
        by_text: dict[str, list[Option]] = {}
        for option, name in names.items():
            for text in {name, name.rpartition(".")[2]}:
                by_text.setdefault(text, []).append(option)
        words = {w: o for o in options for w in MEANINGS.get(o.name, "").split() if len(w) > 3}
        near = difflib.get_close_matches(wanted, [*by_text, *words], n=2, cutoff=0.7)
        for text in near[:1] if near and near[0].endswith(wanted) else near:
            found += by_text.get(text, []) or [words[text]]
    return list(dict.fromkeys(found))[:most]


def has_small_crops(described: Described) -> bool:
    """Whether a recipe has a group of small crops."""
    return any(plain(option.flag).startswith(SMALL_CROPS) for option in described.options)


def unknown_option(word: str, described: Described, whole_list: str) -> str:
    """What to say about an option that does not exist."""
    shown = word.partition("=")[0]
    note = NOTES.get(plain(word))
    near = near_options(word, described)
    if plain(word).startswith(SMALL_CROPS) and not has_small_crops(described):
        return (
            f"unknown option {shown}: this recipe has no small crops; take one of DINO or SwAV "
            "that has, `fastmoco recipes` lists them"
        )
    if note and not any(option.flag == f"--{plain(word)}" for option in near):
        return f"unknown option {shown}; {note}"
    if not near:
        return f"unknown option {shown}; {whole_list} lists all options"
    return f"unknown option {shown}; did you mean {one_of(option.flag for option in near)}?"


def near_commands(words: Sequence[str], commands: Iterable[str]) -> list[str]:
    """Commands that the first words of a command line may mean, the likeliest first.

    Args:
        words: as typed.
        commands: names of all commands.
    """
    known = list(commands)
    wanted = " ".join(words[:2]).lower().replace("_", "-")
    first = words[0].lower().replace("_", "-")
    groups = {name.split()[0] for name in known if " " in name}

    # One word of a command with two, also joined to the first by a hyphen, a colon or a dot.
    joined = re.sub(r"[-:./]", " ", first)
    found = [name for name in known if joined == name or (name.endswith(f" {first}"))]
    if first not in groups:
        found += [name for name, meant in COMMAND_MEANINGS.items() if first in meant.split()]
    if not found:
        # Of an existing group only its own commands.
        own = [name for name in known if name.split()[0] == first] or known
        tail = words[1].lower() if len(words) > 1 and own != known else None
        if tail:
            found = [n for n in own if tail in COMMAND_MEANINGS.get(n, "").split()]
            own_tails = {name.split()[1]: name for name in own}
            near = difflib.get_close_matches(tail, own_tails, n=2, cutoff=0.4)
            found += [own_tails[name] for name in near]
        else:
            every = [*known, *groups]
            found = difflib.get_close_matches(first, every, n=2, cutoff=0.55)
            found += difflib.get_close_matches(wanted, known, n=2, cutoff=0.6)
    return list(dict.fromkeys(found))[:2]


def one_of(names: Iterable[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
