"""Config of the encoder and its heads. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal, get_args

from fastmoco.config.phases import Phases, phases_of
from fastmoco_pipelines.spec import Resume, require

Architecture = Literal[
    "vit_small",
    "deit_small",
    "vit_base",
    "vit_large",
    "vit_huge",
    "vit_conv_small",
    "vit_conv_base",
    "vit_tiny",
    "vit_micro",
    "vit_nano",
    "resnet50",
    "resnet34",
    "resnet18",
    "resnet_nano",
    "swin_tiny",
    "swin_small",
    "swin_base",
    "swin_nano",
    "convnextv2_micro",
    "convnextv2_atto",
    "convnextv2_femto",
    "convnextv2_pico",
    "convnextv2_nano",
    "convnextv2_tiny",
    "convnextv2_base",
    "convnextv2_large",
    "convnextv2_huge",
]
Family = Literal["vit", "resnet", "swin", "convnextv2"]
"""Kind of a trunk, by which a method chooses its heads."""
AttentionBackend = Literal[
    "auto",
    "sdpa",
    "flash",
    "cudnn",
    "efficient",
    "fa4",
    "xformers",
    "explicit",
    "triton",
    "reference",
]
Pooling = Literal["class", "mean", "norm_mean", "class_attention"]
Positions = Literal["sincos", "sincos_columns", "learned", "none"]
MlpNorm = Literal["layer", "batch"]
Recompute = Literal["none", "selective", "full"]
Linears = Literal["native", "float8"]
Blocks = Literal["modules", "fused"]
KINDS = {
    "architecture": Architecture,
    "pooling": Pooling,
    "positions": Positions,
    "mlp_norm": MlpNorm,
    "attention": AttentionBackend,
    "checkpointing": Recompute,
    "linears": Linears,
    "momentum_linears": Linears,
    "blocks": Blocks,
}
ONLY_RESNET = {"zero_residual": "it has no norms at the end of its branches"}
ONLY_SWIN = {
    "window": "its attention has no windows",
    "norm_eps": "its norms add what those of its published weights do",
}
SWIN_PATCHES = {"swin_nano": 2}
"""Pixels per side of the patches of a Swin, else 4."""
NAMES: dict[Family, str] = {
    "vit": "ViT",
    "resnet": "ResNet",
    "swin": "Swin",
    "convnextv2": "ConvNeXt V2",
}
"""How messages call a kind of trunk."""
UNREAD: dict[Family, dict[str, str]] = {
    "vit": ONLY_RESNET | ONLY_SWIN,
    "resnet": {
        "patch_size": "it has no patches",
        "pooling": "its feature is the mean over positions",
        "positions": "it has no positions",
        "mlp_norm": "it has no MLP",
        "freeze_patch_embed": "it has no patch projection, and all of it trains",
        "drop_path": "stochastic depth is that of a ViT",
        "keep_tokens": "it has no tokens",
        "patch_schedule": "it has no patches",
        "attention": "it has no attention",
        "linears": "it multiplies by convolutions",
        "momentum_linears": "it multiplies by convolutions",
        "compile": "its convolutions are kernels of a library already",
        "blocks": "fused blocks are those of a ViT",
        **ONLY_SWIN,
        "window": "it has no attention",
    },
    "swin": {
        **ONLY_RESNET,
        "patch_size": "its patches are those of the architecture, 4 pixels and 2 in swin_nano",
        "pooling": "its feature is the mean of the tokens after the last norm",
        "positions": "its positions are biases of its attention",
        "mlp_norm": "its norms are layer norms",
        "freeze_patch_embed": "its patch projection trains",
        "keep_tokens": "its windows need all tokens",
        "patch_schedule": "its patches are those of the architecture",
        "attention": "its windows have masks, which torch's own attention takes",
        "linears": "float8 is for the blocks of a ViT",
        "momentum_linears": "float8 is for the blocks of a ViT",
        "compile": "its blocks differ in shape, and each would be compiled for itself",
        "blocks": "fused blocks are those of a ViT",
    },
    "convnextv2": {
        **ONLY_RESNET,
        **ONLY_SWIN,
        "patch_size": "the patches of its stem are those of the architecture",
        "pooling": "its feature is the norm of the mean over positions",
        "positions": "it has no positions",
        "mlp_norm": "its norms are layer norms",
        "freeze_patch_embed": "its stem trains",
        "keep_tokens": "it has no tokens",
        "patch_schedule": "the patches of its stem are those of the architecture",
        "attention": "it has no attention",
        "linears": "float8 is for the blocks of a ViT",
        "momentum_linears": "float8 is for the blocks of a ViT",
        "compile": "compiled blocks are those of a ViT",
        "blocks": "fused blocks are those of a ViT",
    },
}
"""Fields that an encoder does not read, and why. They must keep their defaults."""
LEAST_SIDE = {"swin": 32, "swin_nano": 4, "convnextv2": 32, "convnextv2_micro": 16}
"""Pixels per side of the smallest image that leaves a position, by architecture, else by family;
else 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The encoder and its heads. Those of MoCo v3: Chen, Xie, He 2021, section 4."""

    architecture: Architecture = "vit_small"
    """Encoder. `vit_small` has 12 heads as in the paper of MoCo v3, `deit_small` 6 as in DINO. ViT-H
    as published needs `patch_size` 14."""
    image_size: int = 224
    """Height and width in pixels of the first two views and of the evaluation crop."""
    patch_size: int = 16
    """Side of the patches of a ViT, in pixels."""
    window: int = 7
    """Side of the attention windows of a Swin, in tokens; 14 is the other published size. A stage
    whose map is not larger has one window."""
    norm_eps: float = 1e-5
    """What layer norms of a Swin add to the variance: 1e-5 as published, 1e-6 in EsViT."""
    projection_dim: int = 256
    """Width of the vectors that the loss compares."""
    hidden_dim: int = 4096
    """Hidden width of projector and predictor."""
    pooling: Pooling = "class"
    """Feature of a ViT: the class token after the final norm (`class`); or, without a class token,
    the mean of the patch tokens (`mean`), or of the patch tokens after the final norm
    (`norm_mean`); or a class token that reads the patch tokens in two blocks of its own behind the
    others (`class_attention`), as in ExtreMA."""
    positions: Positions = "sincos"
    """Positions of a ViT: the fixed sine-cosine table of MoCo v3 (`sincos`, rows first) or of MAE
    (`sincos_columns`), a trained table, or none."""
    mlp_norm: MlpNorm = "layer"
    """Norm before the MLP of each block of a ViT: layer norm, or batch norm over all tokens of the
    global batch."""
    freeze_patch_embed: bool = True
    """Keep the patch projection of a ViT at its random start values, as MoCo v3 does for stability.
    No effect on the convolutional stem and on ResNets, which always train."""
    drop_path: float = 0.0
    """Rate of stochastic depth of the last block of a ViT, Swin or ConvNeXt V2 in training; it rises
    linearly from 0 at the first block. Each residual branch of an image is left out with this
    probability."""
    zero_residual: bool = True
    """Start the last norm of each residual branch of a ResNet at zero, as in MoCo v3, BYOL and
    SimCLR. `False` starts it at one: MoCo v1 and v2, SwAV."""
    keep_tokens: str = "1"
    """Share of the patch tokens of a view that the trained encoder of a ViT sees in training, a
    number in (0, 1] (FLIP, Li et al. 2023). The momentum encoder and evaluation see all. A single
    number below 1 ends with 5 % of the run with all tokens; a schedule of shares of the run says
    it in full: 0.25@0,0.5@0.6,1@0.95 (docs/token_dropping.md)."""
    patch_schedule: str = ""
    """Larger patches of a ViT in a part of the run, for both encoders: 32@0,16@0.3 takes patches of
    32 pixels in the first 30 % of the run and `patch_size` after it. The same weights serve them;
    views are made smaller (docs/token_dropping.md). Empty: `patch_size` in the whole run."""
    init: Annotated[str, Resume.FREE] = ""
    """File or run whose encoder weights are the start values: a folder of a run, or weights of
    moco-v3, timm, torchvision, Hugging Face or fastmoco (docs/weights.md). Read once, when a run
    begins."""
    attention: AttentionBackend = "auto"
    """Attention backend. `auto` chooses by device and precision and logs why; a named backend is
    used, or the run is refused."""
    checkpointing: Annotated[Recompute, Resume.FREE] = "none"
    """What the backward recomputes instead of keeping its activations: layer norms and GELU of a
    ViT (`selective`) or whole blocks (`full`). The gradients are the same."""
    linears: Annotated[Linears, Resume.WITH_ALLOW] = "native"
    """Products of the blocks' linear layers: `native` in the precision of the run; `float8` by
    torchao, for vit_large and wider, on CUDA with capability 8.9 or later, with bf16 and compiled
    blocks. float8 rounds differently, so the run has other numbers."""
    momentum_linears: Annotated[Linears, Resume.WITH_ALLOW] = "native"
    """The same for the momentum encoder alone, which has no backward: `float8` by torch itself, for
    vit_small and wider, not with fsdp or hsdp. float8 rounds the keys differently, so the run has
    other numbers."""
    compile: Annotated[Literal["auto"] | bool, Resume.FREE] = "auto"
    """Compile the blocks of a ViT with torch.compile: fewer and larger kernels, the same numbers up
    to rounding, about a minute at the start. `auto`: on CUDA, in bf16 and fp32."""
    blocks: Annotated[Blocks, Resume.FREE] = "modules"
    """Encoder blocks as `modules`, or `fused`: a forward and backward written by hand and not
    compiled, which move and keep fewer bytes. The numbers are the same up to rounding."""

    def __post_init__(self) -> None:
        for name, kind in KINDS.items():
            value = getattr(self, name)
            require(value in get_args(kind), name, value, f"must be one of {get_args(kind)}")
        known = self.compile == "auto" or isinstance(self.compile, bool)
        require(known, "compile", self.compile, "must be auto, True or False")
        self._require_read()
        require(self.patch_size >= 1, "patch_size", self.patch_size, "must be at least 1 pixel")
        if self.patch > 1:
            field = "patch_size=" if self.family == "vit" else "the encoder's patches, "
            divides = self.image_size >= self.patch and self.image_size % self.patch == 0
            rule = f"must be a multiple of {field}{self.patch}"
            require(divides, "image_size", self.image_size, rule)
        require(self.window >= 1, "window", self.window, "must be at least 1 token")
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "must be positive")
        rule = f"must be at least {self.least_side} for {self.architecture}"
        require(self.image_size >= self.least_side, "image_size", self.image_size, rule)
        require(0 <= self.drop_path < 1, "drop_path", self.drop_path, "must be in [0, 1)")
        require(
            self.projection_dim >= 2, "projection_dim", self.projection_dim, "must be at least 2"
        )
        require(self.hidden_dim >= 1, "hidden_dim", self.hidden_dim, "must be at least 1")
        if self.momentum_linears == "float8":
            rule = "requires linears=native: linears=float8 already covers the momentum encoder"
            require(self.linears == "native", "momentum_linears", self.momentum_linears, rule)
        if self.linears == "float8":
            # Autograd sees torchao's layer as one operation and cannot recompute a part of it.
            rule = (
                "with linears=float8 would recompute the products like full, and also keep them: "
                "use full or none"
            )
            require(self.checkpointing != "selective", "checkpointing", self.checkpointing, rule)
        for name in ("linears", "momentum_linears"):
            rule = (
                f"{name}=float8 requires --model.compile auto or True: without it, "
                "casts move several times the bytes of products"
            )
            runs = getattr(self, name) != "float8" or self.compile is not False
            require(runs, "compile", self.compile, rule)
        if self.drop_path:
            rule = "blocks=fused has no stochastic depth: use 0, or blocks=modules"
            require(self.blocks != "fused", "drop_path", self.drop_path, rule)
        self._require_phases()
        if self.mlp_norm == "batch":
            # A compiled or fused block has no messages between ranks inside.
            rule = "a batch norm in the blocks exchanges statistics inside them: use {}"
            require(self.blocks != "fused", "mlp_norm", "batch", rule.format("blocks=modules"))
            require(self.compile is not True, "mlp_norm", "batch", rule.format("compile=auto"))
            native = self.linears == self.momentum_linears == "native"
            require(native, "mlp_norm", "batch", "float8 needs compiled blocks: use linears=native")
        if self.blocks == "fused":
            # The fused block is one operation to autograd and to the compiler.
            rule = (
                "blocks=fused always recomputes norms and GELU: use none or full, or blocks=modules"
            )
            require(self.checkpointing != "selective", "checkpointing", self.checkpointing, rule)
            rule = (
                "blocks=fused multiplies in the precision of the run: use native, or blocks=modules"
            )
            require(self.linears == "native", "linears", self.linears, rule)
            rule = "blocks=fused has its own kernels: use auto or False, or blocks=modules"
            require(self.compile is not True, "compile", self.compile, rule)

    @property
    def family(self) -> Family:
        """Kind of the encoder."""
        return next((kind for kind in UNREAD if self.architecture.startswith(kind)), "vit")

    @property
    def least_side(self) -> int:
        """Pixels per side of the smallest image that the encoder takes."""
        return LEAST_SIDE.get(self.architecture, LEAST_SIDE.get(self.family, 1))

    @property
    def patch(self) -> int:
        """Pixels per side of a patch, of which every view has whole ones; 1 without patches."""
        if self.family == "swin":
            return SWIN_PATCHES.get(self.architecture, 4)
        return self.patch_size if self.family == "vit" else 1

    @property
    def phases(self) -> Phases:
        """The parts of a run with constant shapes, by `keep_tokens` and `patch_schedule`."""
        return phases_of(self.keep_tokens, self.patch_schedule, self.patch_size)

    def _require_phases(self) -> None:
        """Refuse schedules that this encoder cannot follow."""
        phases = self.phases
        if phases.plain or self.family != "vit":
            return
        for phase in phases.items:
            patch = phase.patch_size or self.patch_size
            rule = f"image_size={self.image_size} must be a multiple of every patch"
            require(self.image_size % patch == 0, "patch_schedule", self.patch_schedule, rule)
            tokens = (self.image_size // patch) ** 2
            rule = f"keeps none of the {tokens} patch tokens of a view: take a larger share"
            require(phase.kept(tokens) >= 1, "keep_tokens", self.keep_tokens, rule)
        if self.mlp_norm == "batch":
            rule = (
                "a batch norm in the blocks would keep averages of views with fewer tokens than "
                "evaluation has: use mlp_norm=layer"
            )
            name = "keep_tokens" if phases.drops_tokens else "patch_schedule"
            require(False, name, getattr(self, name), rule)
        if self.patch_schedule and self.architecture.startswith("vit_conv"):
            rule = "the patches of the conv stem have 16 pixels: use a ViT with linear patches"
            require(False, "patch_schedule", self.patch_schedule, rule)

    def _require_read(self) -> None:
        """Refuse what would have no effect on this kind of encoder."""
        defaults = {field.name: field.default for field in fields(self)}
        trunk = "a ViT" if self.family == "vit" else self.architecture
        for name, reason in UNREAD[self.family].items():
            value, default = getattr(self, name), defaults[name]
            # Without compiled blocks, False is what `auto` chooses.
            unread = value == default or (name == "compile" and value is False)
            option = f"--model.{name.replace('_', '-')}"
            others = [family for family, unread in UNREAD.items() if name not in unread]
            rule = (
                f"has no effect on {trunk}, because {reason}: take {option} {default}, or a "
                f"{' or a '.join(NAMES[family] for family in others)}"
            )
            require(unread, name, value, rule)
        rule = (
            f"chooses parts of a ViT's blocks, which {self.architecture} does not have: "
            "use full or none"
        )
        selective = self.checkpointing == "selective" and self.family != "vit"
        require(not selective, "checkpointing", self.checkpointing, rule)
