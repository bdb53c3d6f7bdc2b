"""`fastmoco eval linear`: a linear classifier on the frozen encoder of a run."""

from __future__ import annotations

import json as json_module
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from fastmoco.cli.collection import collection_paused
from fastmoco.cli.embed import progress_on
from fastmoco.cli.images import knn_sets_of_ranks, normalisation, of_options
from fastmoco.cli.labelled_run import (
    read_labelled,
    run_to_result,
    show_accuracies,
)
from fastmoco.cli.opening import say_first
from fastmoco.cli.output import is_first, json_log, print_result, run_logged
from fastmoco.errors import EXIT_FINISHED, EXIT_REFUSED, one_line, say, show
from fastmoco.errors.log import Style

Which = Literal["base", "momentum"]
NEEDED_BY = "a linear classifier"
"""As errors about classes name this evaluation."""

if TYPE_CHECKING:
    from fastmoco.models.weights.foreign import Normalised
    from fastmoco.training.linear_official import OfficialOptions


def eval_linear(
    run: Positional[Path],
    *,
    train: str,
    test: str,
    fast: bool = False,
    protocol: Literal["moco_v3", "moby", "mae"] = "moco_v3",
    which: Which | None = None,
    best: bool = False,
    heads: int | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    lr: tuple[float, ...] = (),
    weight_decay: tuple[float, ...] = (),
    epochs: int | None = None,
    batch: int = 0,
    copies: int | None = None,
    crop_min: float | None = None,
    holdout: float = 0.1,
    precision: Literal["fp32", "bf16"] = "fp32",
    seed: int = 0,
    cache: Path | None = None,
    out: Path | None = None,
    log: Style = "auto",
    json: bool = False,
) -> int:
    """Accuracy of a linear classifier on the frozen encoder of a run.

    Args:
        run: Folder of the run, as given to `fastmoco train --out`, one checkpoint, or a file of
            weights.
        train: Labelled shards to train on, or a folder with one folder of images per class.
        test: Labelled shards to classify, or a folder with one folder of images per class.
        fast: Instead of the official protocol (SGD on random crops, 90 epochs, a run of its own in
            --out), compute features once and train classifiers of many rates and decays on them at
            once. Reports that of the official rate, and the best on held-out training images.
        protocol: Whose numbers. MAE's normalises features, with --fast too.
        which: The trained encoder (base), or its moving average (default: as the method evaluates).
        best: The checkpoint of the highest kNN accuracy, not the newest.
        heads: Attention heads, for a file of a ViT that does not show them.
        mean: Of red, green, blue by which images were normalised, for a file that does not say.
        std: The standard deviations.
        lr: Learning rate for a batch of 256 images (default: of the protocol; moco_v3: 3 for a ViT,
            0.1 for a ResNet); with --fast several, which are all tried (default: 0.01 to 10).
        weight_decay: Weight decay (default: 0; with --fast several, 0 to 1e-4).
        epochs: Passes over the images (default: 90, moby 100, mae of ViT-L 50).
        batch: Images of a step; 0: 1024, or fewer below 16,384 images.
        copies: With --fast, augmented copies of the training images whose features are cached
            (default: 10). With as many as epochs it trains on the images of the official protocol;
            0: the images without augmentation.
        crop_min: Smallest share of an image's area in a crop; default: 0.08, and for images of at
            most 64 pixels, crops and flips of the run's first view.
        holdout: With --fast, share of the training images on which rate and decay are chosen.
        precision: Of the encoder; bf16 with --fast alone.
        seed: Of the classifier, the order, the crops and the hold-out.
        cache: Folder of cached features; default: in the user's cache.
        out: Folder for the result, linear.json; without --fast also for the run, which the same
            command continues.
        log: How progress is shown; json is for programs.
        json: Print JSON instead of text.
    """

    def call() -> int:
        say_first(f"linear classifier on {run}: importing torch")
        with (
            one_line(EXIT_REFUSED, ValueError, OSError),
            of_options({"train": train, "test": test}),
        ):
            if fast:
                if protocol == "moby":
                    raise ValueError(
                        f"protocol={protocol!r}: leave out --fast, which has another one"
                    )
                found = _fast(
                    run,
                    train,
                    test,
                    which,
                    best,
                    heads=heads,
                    normalised=normalisation(mean, std),
                    lrs=lr,
                    weight_decays=weight_decay,
                    epochs=90 if epochs is None else epochs,
                    batch_size=batch,
                    copies=copies,
                    crop_min=crop_min,
                    holdout=holdout,
                    protocol=protocol,
                    precision=precision,
                    seed=seed,
                    cache=cache,
                )
            else:
                _require_official(lr, weight_decay, copies, precision, out)
                assert out is not None  # noqa: S101 - a type: required above
                with collection_paused():
                    from fastmoco.training.linear_official import OfficialOptions

                options = OfficialOptions(
                    protocol=protocol,
                    lr=lr[0] if lr else None,
                    weight_decay=weight_decay[0] if weight_decay else 0.0,
                    epochs=epochs,
                    batch_size=batch,
                    crop_min=crop_min,
                    seed=seed,
                )
                code, found = _official(
                    run, train, test, which, best, heads, normalisation(mean, std), out, options
                )
                if code != EXIT_FINISHED:
                    return code
            if found is not None:
                _report(found, out, json)
        return EXIT_FINISHED

    return run_logged(log, call)


def _require_official(
    lr: tuple[float, ...],
    weight_decay: tuple[float, ...],
    copies: int | None,
    precision: str,
    out: Path | None,
) -> None:
    """Refuse options that only --fast has."""
    for name, values in (("lr", lr), ("weight_decay", weight_decay)):
        if len(values) > 1:
            raise ValueError(
                f"{name}={list(values)}: the official protocol has one; several need --fast"
            )
    if copies is not None:
        raise ValueError(f"copies={copies}: needs --fast; the official protocol crops every epoch")
    if precision != "fp32":
        raise ValueError(f"precision={precision!r}: needs --fast; the official protocol has fp32")
    if out is None:
        raise ValueError(
            "--out is missing: the official protocol is a run of its own in this folder, which the "
            "same command continues; or give --fast"
        )


def _fast(
    run: Path,
    train: str,
    test: str,
    which: Which | None,
    best: bool,
    *,
    heads: int | None,
    normalised: Normalised | None,
    lrs: tuple[float, ...],
    weight_decays: tuple[float, ...],
    copies: int | None,
    cache: Path | None,
    **others: Any,
) -> dict[str, Any] | None:
    """The result of `--fast`; None on ranks other than the first."""
    with collection_paused():
        from fastmoco.distributed.mesh import start_world, stop_world
        from fastmoco.evaluation.feature_cache import WAIT_S, make_room
        from fastmoco.faults.first_cause import first_cause
        from fastmoco.training import linear_fast
        from fastmoco.training.encoder_source import load_source
        from fastmoco.training.images import max_side_for
        from fastmoco_pipelines.files.whole import user_cache
        from fastmoco_pipelines.text import counted

    own = user_cache() / "features"
    options = linear_fast.FastOptions(
        lrs=lrs or linear_fast.LRS,
        weight_decays=weight_decays or linear_fast.WEIGHT_DECAYS,
        copies=linear_fast.COPIES if copies is None else copies,
        cache=cache if cache is not None else own,
        **others,
    )
    world = start_world("auto", timeout_s=WAIT_S)
    with first_cause(world):
        source = load_source(
            run, world.device, which=which, best=best, heads=heads, normalised=normalised
        )
        if world.rank == 0:
            for note in source.notes:
                say(note)
        side = max_side_for(source.image.size, source.config)
        bank, queries = knn_sets_of_ranks(world, train, test, max_side=side, needed_by=NEEDED_BY)
        found = linear_fast.fast_linear(
            source, bank, queries, world, options, progress=partial(progress_on, world), tell=say
        )
    stop_world()
    if world.rank:
        return None
    if cache is None:  # a folder that is named belongs to the user
        count, size = make_room(own)
        if count:
            say(
                f"{own}: {counted(count, 'cache')} of features, used longest ago, removed "
                f"({size / 1e9:.1f} GB): they take no more than is free beside them"
            )
    return found


def _official(
    run: Path,
    train: str,
    test: str,
    which: Which | None,
    best: bool,
    heads: int | None,
    normalised: Normalised | None,
    out: Path,
    options: OfficialOptions,
) -> tuple[int, dict[str, Any] | None]:
    """Exit code and result of the official protocol; without a result on ranks other than the
    first, and where the run was stopped."""
    with collection_paused():
        from fastmoco.recipes.supervised import linear_probe
        from fastmoco.training.linear_official import official_config, official_result

    source, train, test = read_labelled(
        run,
        train,
        test,
        which=which,
        best=best,
        heads=heads,
        normalised=normalised,
        needed_by=NEEDED_BY,
    )
    config = official_config(
        source,
        train,
        test,
        out,
        options,
        recipe=linear_probe(),
        tell=say if is_first() else lambda text: None,
    )
    code, reports = run_to_result(config, out)
    return code, official_result(source, out, options) if reports else None


def _report(found: dict[str, Any], out: Path | None, as_json: bool) -> None:
    """Print a result, and write it into a folder."""
    from fastmoco_pipelines.files.whole import write_file

    line = json_module.dumps(found)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / "linear.json", line.encode() + b"\n")
    if as_json or json_log() is not None:
        print_result(line)
        return
    show_accuracies(found, f"lr {found['lr']:g}, weight decay {found['weight_decay']:g}")
    best = found["best"]
    if found["protocol"] == "fast":
        chosen = found["settings"]["holdout_images"]
        show_accuracies(
            best,
            f"lr {best['lr']:g}, weight decay {best['weight_decay']:g}: the best of "
            f"{len(found['sweep'])} on {chosen} held-out training images",
        )
    else:
        show_accuracies(best, f"epoch {best['epoch']:g}, the best of all on the test images")
    show(
        f"{found['images']} test images, {found['classes']} classes, {found['protocol']} protocol, "
        f"step {found['step']} of {found['source']}"
    )
    if out is not None:
        show(f"wrote {out / 'linear.json'}")
