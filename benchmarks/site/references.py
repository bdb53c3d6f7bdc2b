"""Pages of the public names of the packages. mkdocstrings reads them from the source, without
importing it; here is only which names there are.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Reference:
    """A page.

    Attributes:
        module: whose names it has: those of `__all__`, or all public ones of its file.
        title: in the navigation.
        about: its first paragraph.
        names: those of a module without `__all__`, if not all public ones.
    """

    module: str
    title: str
    about: str
    names: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The page, from the folder of the pages."""
        return f"reference/{self.module.replace('.', '_')}.md"


REFERENCES = (
    Reference(
        "fastmoco_kernels",
        "fastmoco_kernels",
        "Fused operations. They need torch and nothing else of the project; "
        "[Only the ops](../ops.md) shows each in use.",
    ),
    Reference(
        "fastmoco_pipelines",
        "fastmoco_pipelines",
        "From a folder of images to batches of views. [Data](../data.md) and "
        "[Views](../views.md) are the guides.",
    ),
    Reference(
        "fastmoco.config",
        "fastmoco.config",
        "The configuration of a run: frozen dataclasses that check their values. Every field is an "
        "option of the command line with a dotted name.",
    ),
    Reference(
        "fastmoco.recipes",
        "fastmoco.recipes",
        "Complete configurations by name.",
    ),
    Reference(
        "fastmoco.objectives.interface",
        "fastmoco.objectives",
        "What a method is for the trainer. [Add an objective](../add_an_objective.md) is the guide.",
    ),
    Reference(
        "fastmoco.objectives.build",
        "fastmoco.objectives.build",
        "From a configuration to its method.",
        names=("OBJECTIVES", "build_objective", "build_model"),
    ),
    Reference(
        "fastmoco.objectives.moco_v3",
        "fastmoco.objectives.moco_v3",
        "MoCo v3 as a module.",
        names=("MoCoV3",),
    ),
    Reference(
        "fastmoco.models",
        "fastmoco.models",
        "Encoders and heads.",
    ),
    Reference(
        "fastmoco.models.encoder_file",
        "fastmoco.models.encoder_file",
        "The encoder of a run in one file. [The encoder](../encoder.md) is the guide.",
        names=("load_encoder", "LoadedEncoder", "describe_run"),
    ),
    Reference(
        "fastmoco.evaluation.embed",
        "fastmoco.evaluation.embed",
        "Features of a set of images.",
    ),
    Reference(
        "fastmoco.evaluation.knn",
        "fastmoco.evaluation.knn",
        "Exact nearest neighbours and kNN accuracy of features, in one process or several.",
    ),
    Reference(
        "fastmoco.evaluation.linear",
        "fastmoco.evaluation.linear",
        "Linear classifiers on features, many learning rates at once.",
    ),
    Reference(
        "fastmoco.optim",
        "fastmoco.optim",
        "Optimizers and schedules. [Optimizers](../optimizers.md) compares them.",
    ),
    Reference(
        "fastmoco.training.trainer",
        "fastmoco.training.trainer",
        "A run from its configuration to its last checkpoint.",
        names=("Trainer",),
    ),
    Reference(
        "fastmoco.distributed",
        "fastmoco.distributed",
        "Ranks, and how a model is spread over them.",
    ),
    Reference(
        "fastmoco.run.events",
        "fastmoco.run.events",
        "The events of a run. [Is my run healthy?](../stability.md#events) lists their names.",
    ),
    Reference(
        "fastmoco.telemetry.trackers.interface",
        "fastmoco.telemetry.trackers",
        "What a tracker is to a run. [Trackers](../trackers.md#add-a-sink) is the guide.",
    ),
    Reference(
        "fastmoco.checkpoint",
        "fastmoco.checkpoint",
        "Durable saves and verified loads.",
    ),
    Reference(
        "fastmoco_pipelines.stores",
        "fastmoco_pipelines.stores",
        "What a store of shards is for a loader. [Add a store](../add_a_store.md) is the guide.",
    ),
    Reference(
        "fastmoco_pipelines.errors",
        "fastmoco_pipelines.errors",
        "What loaders, stores and packing raise, beside the two of `fastmoco_pipelines` itself.",
        names=(
            *("LostIndexError", "RemoteError", "AbsentError", "AccessError"),
            *("PassingError", "BusyError", "WrongContentError", "StoppedError"),
            *("LoaderTimeoutError", "TooManyBadSamplesError", "TarError", "LabelError"),
            *("StructureError", "ImageRefusedError", "NoRoomError", "DecodeError"),
            "DecoderBrokenError",
        ),
    ),
    Reference(
        "fastmoco_pipelines.text",
        "fastmoco_pipelines.text",
        "Texts as they may be shown: without secrets.",
        names=("redact", "without_secrets", "shown"),
    ),
    Reference(
        "fastmoco_pipelines.loading.step_parts",
        "fastmoco_pipelines.loading.step_parts",
        "Where the time of a step goes. [Where the time goes](../profile.md) is the guide.",
        names=("collecting", "part", "Collector", "PartFigures"),
    ),
)
"""Every page, in the order of the navigation."""


def nav() -> list[dict[str, str] | str]:
    """The part of the navigation with the reference."""
    return ["reference/index.md", *({page.title: page.path} for page in REFERENCES)]


def make() -> dict[str, str]:
    """The text of every page, by its path."""
    rows = [
        f"| [`{page.title}`]({page.path.split('/')[1]}) | {page.about} |" for page in REFERENCES
    ]
    table = "\n".join(["| module | |", "|---|---|", *rows])
    about = "The public names of the packages, with shapes, dtypes, units and errors."
    found = {"reference/index.md": f"# Reference\n\n{about}\n\n{table}\n"}
    for page in REFERENCES:
        names = "\n\n".join(f"::: {name}" for name in public_names(page.module, page.names))
        found[page.path] = f"# {page.title}\n\n{page.about}\n\n{names}\n"
    return found


def public_names(module: str, names: Sequence[str] = ()) -> list[str]:
    """The full names of what a module exports, each by the module that defines it, read from the
    source; in the order of `__all__`.

    Args:
        module: its name.
        names: instead of all public ones.

    Raises:
        ValueError: if one of `names`, or an exported name, is imported from nowhere and not defined in the file.
    """
    tree = ast.parse(file_of(module).read_text())
    homes = {name: f"{module}.{name}" for name in _defined(tree)}
    homes |= dict(_imported(tree))
    wanted = list(names) or _exported(tree)
    wanted = wanted or [n for n in (*_defined(tree), *_again(tree)) if not n.startswith("_")]
    missing = [name for name in wanted if name not in homes]
    if missing:
        raise ValueError(f"{module} does not define {', '.join(missing)}")
    return [homes[name] for name in wanted]


def file_of(module: str) -> Path:
    """The source of a module or package."""
    root, _, rest = module.partition(".")
    folders = {"fastmoco_kernels": "kernels", "fastmoco_pipelines": "pipelines"}
    path = (ROOT / folders.get(root, "") / root).joinpath(*rest.split(".") if rest else ())
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Names that a file takes from other modules, also for type checkers alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _again(tree: ast.Module) -> Iterator[str]:
    """Names that a file exports again by `import x as x`."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if alias.asname == alias.name)


def _exported(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["__all__"]:
            return [str(name) for name in ast.literal_eval(node.value)]
    return None
