"""`fastmoco tune`: measure what changes only the speed of a recipe on this machine, and write a
launch script with the fastest settings.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastmoco.config import Config
from fastmoco.config.limits import require_limits
from fastmoco.errors import EXIT_FINISHED, EXIT_INTERRUPTED, EXIT_REFUSED, one_line, say, show
from fastmoco.planning.tuning import script, table
from fastmoco.planning.tuning.machine import Machine, commit, this_machine
from fastmoco.planning.tuning.measure import FreshProcess, Measurement, ignored_variables
from fastmoco.planning.tuning.search import Criterion, Result, Row, Search
from fastmoco.planning.tuning.settings import Settings
from fastmoco.planning.tuning.space import Candidate, Group, Skipped, space
from fastmoco_pipelines.spec import require

SECONDS = {"s": 1, "m": 60, "h": 3600}
"""Units of a budget."""
MOST_HOURS = 100
"""Of a budget."""


@dataclass(frozen=True, kw_only=True)
class TuneArguments:
    """Measure settings that change only speed on this machine, and write a launch script with the
    fastest: threads, chunks, checkpointing, attention, compiled and fused blocks, the loader,
    allocators. It needs --data.shards, or --data.synthetic; docs/tuning.md explains the search.
    """

    out: Path
    """The script to write, e.g. launch/NAME.sh."""
    budget: str = "10m"
    """Time for all measurements, e.g. 90s, 10m or 1h."""
    criterion: Literal["auto", "wall", "cpu"] = "auto"
    """What is compared: images per second (`wall`) or per second of processor time (`cpu`). `auto`:
    `cpu` on a CPU that other processes use too."""
    only: tuple[Group, ...] = ()
    """Groups of settings to measure; default all."""
    gpus: int = 1
    """Processes of the run. One of them is measured, with its part of the batch and without the
    others."""
    plan_only: bool = False
    """Measure nothing, and write what `fastmoco plan` chooses for --gpus of --memory."""
    memory: str = "80GiB"
    """Memory of each GPU, for --plan-only."""
    force: bool = False
    """Replace the script if it exists."""
    json: bool = False
    """Print the result as JSON; progress then is on standard error."""
    config: Annotated[Config, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        require_limits(self)
        require(self.gpus >= 1, "gpus", self.gpus, "must be at least 1")
        budget_seconds(self.budget)


def budget_seconds(text: str) -> float:
    """Seconds of a budget such as `10m`.

    Raises:
        ValueError: if the text is not a time.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([smh]?)\s*", text)
    rule = f"must be a time above 0 with s, m or h, e.g. 10m, and at most {MOST_HOURS}h"
    seconds = float(match[1]) * SECONDS[match[2] or "s"] if match is not None else 0.0
    require(0 < seconds <= MOST_HOURS * SECONDS["h"], "budget", text, rule)
    return seconds


def _with_unit(budget: str) -> str:
    """A budget as it was typed, in seconds if it has no unit."""
    return budget if budget.strip()[-1] in SECONDS else f"{budget.strip()}s"


def tune(options: TuneArguments, typed: Mapping[str, Sequence[str]], trained: str) -> int:
    """Measure or plan, and write the script.

    Args:
        options: of the command.
        typed: the options that the user has typed, by dotted name, each with its words.
        trained: what the script trains: the name of a recipe, or the path of a config file.

    Returns:
        0; 130 after Ctrl-C, which writes nothing.
    """
    with one_line(EXIT_REFUSED, ValueError, OSError):
        script.check_place(options.out, force=options.force)
        if options.plan_only:
            return _write_plan(options, typed, trained)
        config = _measured_config(options)
        search, watch = _prepared(options, config, typed)
        try:
            with watch():
                result = search.run()
        except KeyboardInterrupt:
            _interrupted(search, options)
            return EXIT_INTERRUPTED
        machine = this_machine()
        text = _script(options, typed, trained, result, machine)
        script.write(options.out, text)
    _report(options, result)
    return EXIT_FINISHED


def _measured_config(options: TuneArguments) -> Config:
    """The config of one process of the run, with its part of batch and cores.

    Raises:
        ValueError: if it has no images, or the processes cannot divide its batch.
    """
    config, gpus = options.config, options.gpus
    batch = config.global_batch_size
    rule = f"must divide global_batch_size={batch}"
    require(batch % gpus == 0, "gpus", gpus, rule)
    rule = "must be shards here: fastmoco data pack makes them, then give --data.shards"
    require(not config.data.images, "data.images", config.data.images, rule)
    rule = (
        "must name the shards to measure with, e.g. --data.shards 'data/train-*.tar'; or measure "
        "without a loader: --data.synthetic"
    )
    named = bool(config.data.shards) or config.data.synthetic
    require(named, "data.shards", config.data.shards, rule)
    if gpus == 1:
        return config
    # A process of the run has a part of the cores, which its number of threads follows.
    threads = config.threads or len(_share(this_machine(), gpus).cores)
    return replace(config, global_batch_size=batch // gpus, threads=threads)


def _share(machine: Machine, processes: int) -> Machine:
    """The part of a machine that one of several processes has."""
    count = max(1, len(machine.cores) // processes)
    cores = machine.cores[:count]
    one_per_core = tuple(core for core in machine.one_per_core if core in cores)
    return replace(machine, cores=cores, one_per_core=one_per_core)


def _prepared(
    options: TuneArguments, config: Config, typed: Mapping[str, Sequence[str]]
) -> tuple[Search, Callable[[], contextlib.AbstractContextManager[None]]]:
    """The search, and a context that shows it."""
    stream = sys.stderr if options.json else sys.stdout

    def candidates(
        default: Measurement, criterion: Criterion
    ) -> tuple[list[Candidate], list[Skipped]]:
        resolved = dict(default.details) | {"batch": config.global_batch_size}
        return space(
            config,
            _share(this_machine(), options.gpus),
            resolved,
            given=tuple(typed),
            only=options.only,
            wall=criterion == "wall",
            processes=options.gpus,
        )

    shown = _Shown(stream)
    search = Search(
        FreshProcess(config),
        candidates,
        budget_s=budget_seconds(options.budget),
        criterion=options.criterion,
        changed=shown.changed,
        note=shown.note,
    )
    shown.search = search
    print(
        f"{config.recipe}: {_with_unit(options.budget)} of measurements; the defaults first",
        file=stream,
        flush=True,
    )
    if ignored := ignored_variables():
        say(f"measured without these variables of the shell: {', '.join(ignored)}")
    return search, shown.during


class _Shown:
    """Shows a search: on a terminal its table as it fills, else a line for each measurement.

    Args:
        stream: where.
    """

    def __init__(self, stream: Any) -> None:
        self.search: Search | None = None
        self._stream = stream
        self._live: Any = None

    @contextmanager
    def during(self) -> Iterator[None]:
        """Show the search while it runs."""
        if not self._stream.isatty():
            yield
            return
        from rich.live import Live

        from fastmoco.errors.terminal import Terminal

        console = Terminal(self._stream, highlight=False)
        with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def changed(self, row: Row | None) -> None:
        """Show a new measurement."""
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        elif row is not None:
            print(table.line(row), file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Show a line."""
        if self._live is not None:
            self._live.console.print(text, markup=False)
        else:
            print(text, file=self._stream, flush=True)

    def _table(self) -> Any:
        from rich.box import SIMPLE
        from rich.table import Table

        shown = Table(*table.HEADING, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
        for row in self.search.rows if self.search is not None else ():
            shown.add_row(*table.cells(row))
        return shown


def _interrupted(search: Search, options: TuneArguments) -> None:
    """After Ctrl-C: the table so far, and the fastest settings in it."""
    if not options.json:
        print(table.table(search.rows, search.skipped))
    best = search.best()
    shown = "nothing was compared yet"
    if best is not None and best.ratio is not None:
        shown = f"the best so far: {best.settings}, ratio {best.ratio:.3f}, not compared again"
    say(f"interrupted, {options.out} is not written; {shown}")


def _report(options: TuneArguments, result: Result) -> None:
    """Print the result."""
    if options.json:
        found = table.to_json(result) | {"script": str(options.out)}
        print(json.dumps(found, indent=2))
        return
    print(table.table(result.rows, result.skipped))
    print("\n".join(table.summary(result)))
    show(f"fastest: {result.chosen}")
    show(f"written: {options.out}")


def _script(
    options: TuneArguments,
    typed: Mapping[str, Sequence[str]],
    trained: str,
    result: Result,
    machine: Machine,
) -> str:
    """The script of a search."""
    details = result.default.details
    about = [
        f"Measured on {machine.line(str(details['device']), details['versions'])}; "
        f"{details['precision']}.",
        *table.summary(result),
    ]
    if result.others_share is not None:
        about.append(f"Meanwhile other processes took {result.others_share:.0%} of the cores.")
    if options.gpus > 1:
        images = options.config.global_batch_size // options.gpus
        about.append(f"One process was measured, with {images} images a step and no messages.")
    on_gpu = details["device_type"] == "cuda"
    return _text(options, typed, trained, result.chosen, about, on_gpu=on_gpu)


def _write_plan(options: TuneArguments, typed: Mapping[str, Sequence[str]], trained: str) -> int:
    """Write the script of the planner's choice."""
    settings, about, found = _planned(options, typed)
    text = _text(options, typed, trained, settings, about, on_gpu=options.config.device != "cpu")
    script.write(options.out, text)
    if options.json:
        shown = {"chosen": table.settings_json(settings), "plan": found}
        print(json.dumps(shown | {"script": str(options.out)}, indent=2))
    else:
        print("\n".join(about))
        show(f"chosen: {settings}")
        show(f"written: {options.out}")
    return EXIT_FINISHED


def _planned(
    options: TuneArguments, typed: Mapping[str, Sequence[str]]
) -> tuple[Settings, list[str], dict[str, Any]]:
    """The setting that fits with the fewest FLOPs computed twice, and how it was found. A typed
    setting stays.

    Raises:
        ValueError: if nothing fits.
    """
    from fastmoco.cli.plan import count, describe, memory_of

    memory = memory_of(options.memory)
    found = describe(count(options.config), options.gpus, memory, gpus_per_node=options.gpus)
    shared = found["chosen"]["state_over"]
    rows = [row for row in found["settings"] if row["state_over"] == shared and row["fits"]]
    if "model.checkpointing" in typed:
        rows = [row for row in rows if row["checkpointing"] == options.config.model.checkpointing]
    if not rows:
        raise ValueError(
            f"memory={options.memory!r}: no setting of {options.config.recipe} fits on "
            f"{options.gpus} GPUs; `fastmoco plan` shows what each needs"
        )
    row = min(rows, key=lambda row: row["plan"]["overhead"])
    plan = row["plan"]

    # What the plan needs beside the defaults. How many graphs are kept is planned again at the
    # start, from the memory that is free then.
    chosen: list[tuple[str, str | int | float | bool]] = []
    if row["checkpointing"] != options.config.model.checkpointing:
        chosen.append(("model.checkpointing", row["checkpointing"]))
    if plan["chunk"]:
        chosen.append(("batch.chunk", plan["chunk"]))
    if plan["activation_budget"] < 1:
        chosen.append(("batch.activation_budget", plan["activation_budget"]))
    passes = (
        f"{plan['chunks']} chunks of {plan['chunk']} images, {plan['kept_images']} keep their graphs"
        if plan["chunk"]
        else "all images at once"
    )
    peak = (row["step_bytes"] + row["state_bytes"]["total"]) / 2**30
    on_cpu = options.config.device == "cpu"
    kind, several = ("CPU process", "CPU processes") if on_cpu else ("GPU", "GPUs")
    each = f"{options.gpus} {several if options.gpus > 1 else kind} of {options.memory}"
    about = [
        f"Not measured{'' if on_cpu else ' on a GPU'}: the choice of the planner (fastmoco plan) "
        f"for {each}, {found['local_batch_size']} images each, {found['precision']}:",
        f"    {passes}; checkpointing {row['checkpointing']}; {plan['overhead']:+.1%} FLOPs; "
        f"{peak:.1f} GiB at the peak.",
        f"On the {'CPU' if on_cpu else 'GPU'}, `fastmoco tune` without --plan-only replaces this "
        "file by a measured one.",
    ]
    return Settings(options=tuple(chosen)), about, row


def _text(
    options: TuneArguments,
    typed: Mapping[str, Sequence[str]],
    trained: str,
    settings: Settings,
    about: Sequence[str],
    *,
    on_gpu: bool,
) -> str:
    """The text of a script."""
    out = options.out
    name = out.name if out.is_absolute() else str(out)
    own = {field.name for field in fields(TuneArguments)}
    command = ["tune", trained]
    for key, words in typed.items():
        command += ("--out", name) if key == "out" else script.without_paths(key, words)
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return script.Script(
        recipe=trained,
        overrides={key: words for key, words in typed.items() if key not in own},
        settings=settings,
        command=command,
        name=name,
        about=about,
        made=f"on {today} at commit {commit()}",
        processes=options.gpus,
        on_gpu=on_gpu,
        beside_settings=(out.parent / script.SETTINGS).exists(),
    ).text()
