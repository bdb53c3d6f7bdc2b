"""`fastmoco export`: the encoder of a run or of a file, in the format of another package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from fastmoco.errors import EXIT_FINISHED, EXIT_REFUSED, one_line, say, show


def export(
    source: Positional[Path],
    *,
    to: Literal["timm", "torchvision", "hf", "moco-v3", "safetensors", "torch-export", "onnx"],
    out: Path,
    which: Literal["base", "momentum"] | None = None,
    best: bool = False,
    images: str = "",
    heads: int | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> int:
    """Write an encoder in the format of another package, and compare features before it is good.

    Features of 32 images are computed by the encoder and by the file, which is read back by
    transformers, onnxruntime or torch.export. The file gets its name if they agree.

    Args:
        source: Folder of a run or of one checkpoint; or weights of moco-v3, timm, torchvision,
            Hugging Face or fastmoco.
        to: The format. hf writes a folder, the others a file.
        out: A new file or folder; a report is written beside it.
        which: The trained encoder (base), or its moving average (default: the one that the
            method evaluates: for DINO, EsViT and ExtreMA the average, else the trained one).
        best: The checkpoint with the highest kNN accuracy, in place of the newest.
        images: Images to compare features of: shards or a folder of images. Default: those of the
            run.
        heads: Attention heads, for a file of a ViT that does not show them.
        mean: Of red, green, blue by which images were normalised, for a file that does not say.
        std: The standard deviations.
    """
    from fastmoco.cli.collection import collection_paused

    with one_line(EXIT_REFUSED, ValueError, OSError):
        with collection_paused():
            from fastmoco.cli.images import normalisation, set_of_folder
            from fastmoco.training.export_run import export_encoder

        done = export_encoder(
            source,
            to,
            out,
            which=which,
            best=best,
            heads=heads,
            normalised=normalisation(mean, std),
            shards=set_of_folder(images, named="images") if images else None,
            report=say,
        )
        compared = done.comparison
        show(f"wrote {done.tensors} tensors to {done.path}; report in {done.report}")
        show(
            f"features of {compared.images} images ({done.images}) by {compared.reader}: lowest "
            f"cosine {compared.lowest_cosine:.8f}, largest error {compared.max_error:.2g} where "
            f"features reach {compared.max_feature:.2g}"
        )
        if to == "hf":
            show(
                "load it by AutoModel.from_pretrained, a ViT with add_pooling_layer=False: the "
                "feature is last_hidden_state[:, 0], of a ResNet pooler_output"
            )
    return EXIT_FINISHED
