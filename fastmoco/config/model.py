"""What the encoder and its heads are. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from fastmoco_pipelines.spec import Resume, require

Architecture = Literal[
    "vit_small",
    "vit_base",
    "vit_large",
    "vit_huge",
    "vit_conv_small",
    "vit_conv_base",
    "vit_tiny",
    "vit_micro",
    "vit_nano",
]
AttentionBackend = Literal[
    "auto", "sdpa", "flash", "cudnn", "efficient", "fa4", "xformers", "explicit", "triton", "reference"
]
Recompute = Literal["none", "selective", "full"]
Linears = Literal["native", "float8"]
Blocks = Literal["modules", "fused"]
KINDS = {
    "architecture": Architecture,
    "attention": AttentionBackend,
    "checkpointing": Recompute,
    "linears": Linears,
    "momentum_linears": Linears,
    "blocks": Blocks,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The encoder and its heads (Chen, Xie, He 2021, section 4)."""

    architecture: Architecture = "vit_small"
    """Encoder; ViT-S has 12 heads as in the paper, not DeiT's 6. ViT-H as published needs ``patch_size`` 14."""
    image_size: int = 224
    """Height and width of a view in pixels; the first two views and the evaluation crop have it."""
    patch_size: int = 16
    """Height and width of a patch in pixels; divides ``image_size``."""
    projection_dim: int = 256
    """Width of the vectors that the loss compares."""
    hidden_dim: int = 4096
    """Hidden width of projector and predictor."""
    attention: AttentionBackend = "auto"
    """Who computes attention: ``auto`` decides by device and precision, and the run says why; a name, or nothing starts."""
    checkpointing: Annotated[Recompute, Resume.FREE] = "none"
    """Activations computed again in the backward: ``selective`` layer norms and GELU, ``full`` whole blocks. Same gradients."""
    linears: Annotated[Linears, Resume.WITH_ALLOW] = "native"
    """Products of the blocks' linear layers: ``native`` in the run's precision; ``float8`` by torchao, for vit_large and wider
    on CUDA from capability 8.9 on, in bf16 and compiled. Another rounding, so another run."""
    momentum_linears: Annotated[Linears, Resume.WITH_ALLOW] = "native"
    """The same for the momentum encoder alone, which has no backward: ``float8`` by torch itself, for vit_small and wider. Not
    under fsdp or hsdp. Another rounding of the keys, so another run."""
    compile: Annotated[Literal["auto"] | bool, Resume.FREE] = "auto"
    """Blocks through torch.compile: fewer and larger kernels, the same numbers to rounding, about a minute at the start.
    ``auto``: on CUDA, in bf16 and fp32."""
    blocks: Annotated[Blocks, Resume.FREE] = "modules"
    """Encoder blocks as ``modules``, or ``fused``: forward and backward written by hand, not compiled, fewer bytes moved and
    kept, the same numbers to rounding."""

    def __post_init__(self) -> None:
        for name, kind in KINDS.items():
            value = getattr(self, name)
            require(value in get_args(kind), name, value, f"must be one of {get_args(kind)}")
        known = self.compile == "auto" or isinstance(self.compile, bool)
        require(known, "compile", self.compile, "must be auto, True or False")
        require(self.patch_size >= 1, "patch_size", self.patch_size, "must be at least 1 pixel")
        divides = self.image_size >= self.patch_size and self.image_size % self.patch_size == 0
        require(divides, "image_size", self.image_size, f"must be a multiple of patch_size={self.patch_size}")
        require(self.projection_dim >= 2, "projection_dim", self.projection_dim, "must be at least 2")
        require(self.hidden_dim >= 1, "hidden_dim", self.hidden_dim, "must be at least 1")
        if self.momentum_linears == "float8":
            rule = "goes with linears=native: linears=float8 covers the momentum encoder too"
            require(self.linears == "native", "momentum_linears", self.momentum_linears, rule)
            rule = "momentum_linears=float8 needs --model.compile: uncompiled, casts move several times the products' bytes"
            require(self.compile is not False, "compile", self.compile, rule)
        if self.linears == "float8":
            # torchao's layer is one operation to autograd, which cannot stop inside of it.
            rule = "with linears=float8 would compute products twice as full does, and keep them too: take full or none"
            require(self.checkpointing != "selective", "checkpointing", self.checkpointing, rule)
            rule = "linears=float8 needs --model.compile auto or True: uncompiled, casts move several times the bytes of products"
            require(self.compile is not False, "compile", self.compile, rule)
        if self.blocks == "fused":
            # The fused block is one operation to autograd and to the compiler.
            rule = "blocks=fused recomputes norms and GELU always: take none or full, or blocks modules"
            require(self.checkpointing != "selective", "checkpointing", self.checkpointing, rule)
            rule = "blocks=fused multiplies in the run's precision: take native, or blocks modules"
            require(self.linears == "native", "linears", self.linears, rule)
            rule = "blocks=fused brings its own kernels: take auto or False, or blocks modules"
            require(self.compile is not True, "compile", self.compile, rule)
