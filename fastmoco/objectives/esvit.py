"""EsViT (Li et al. 2022): DINO, and the same task between regions of the crops, each of which is
compared with the region of the teacher's crop that is most like it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.config import Config
from fastmoco.models.vit import REGION_POOLINGS
from fastmoco.objectives.dino import DINO, LARGE, Centring, HeadRows, large, options_of, scores
from fastmoco.objectives.interface import Features, Inputs, Output, Progress
from fastmoco.objectives.momentum import Average
from fastmoco.objectives.view_pairs import by_image, each_size
from fastmoco.recipes.esvit import EsViTConfig
from fastmoco_kernels import soft_cross_entropy_of_pairs
from fastmoco_pipelines.loading.step_parts import KEY_FORWARD, LOSS, QUERY_FORWARD, part


class EsViT(DINO):
    """DINO with a second head, whose rows are the tokens of the encoder's last map: regions.

    Token i of a crop v has as its target, for each large crop q that is another one, token
    `j = argmax_j cos(f_i, f'_j)` of the momentum encoder, where f and f' are the tokens after the
    encoders' last norm, before the heads, and nothing differentiates the choice. The loss of such
    a pair of crops is the mean over images and tokens of
    `sum_k -softmax((r'_j - c) / tau')_k log_softmax(r_i / tau)_k`, with the outputs r of the second
    head and a centre c of its own; that of regions is the mean over the pairs of crops, and the
    whole loss half of that of views and half of that of regions.

    Outputs of regions are never stored as a whole, neither the encoder's nor those of the momentum
    encoder (`soft_cross_entropy_of_pairs`). No images are coupled, as in DINO.

    Args:
        build_encoder: as for `DINO`; with regions, its encoders have `regions`.
        region: whether regions are compared; without them this is DINO.
        of_views: further arguments of `DINO`; both heads have the same.

    Attributes:
        region_head: the second head, on tokens.
        momentum_region_head: its average.
        region_center: [1, K], of the outputs of all tokens of the large crops.

    Raises:
        ValueError: if the encoder has no tokens, or a ViT has another feature than those of
            `REGION_POOLINGS`.
    """

    region_center: Tensor

    def __init__(
        self, build_encoder: Callable[[], Any], *, region: bool = True, **of_views: Any
    ) -> None:
        super().__init__(build_encoder, **of_views)
        self.region = region
        if not region:
            return
        if not hasattr(self.encoder, "regions"):
            raise ValueError(
                "model.architecture: must be a ViT or a Swin, whose tokens are regions; or take "
                "objective.region False"
            )
        pooling = getattr(self.encoder, "pooling", REGION_POOLINGS[0])
        if pooling not in REGION_POOLINGS:
            raise ValueError(
                f"model.pooling={pooling!r}: its feature is not that of the tokens that are compared; "
                f"take --model.pooling {REGION_POOLINGS[0]}, or objective.region False"
            )
        self.region_head, self.momentum_region_head = self._build_head(), self._build_head()
        self._region_average = Average(self.region_head, self.momentum_region_head, **self._ema)
        self.register_buffer("region_center", torch.zeros_like(self.center))
        self._region_centring = Centring(self._center_momentum)

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> EsViT:
        """The objective of a config.

        Raises:
            ValueError: if the encoder has no tokens.
        """
        own = config.objective
        assert isinstance(own, EsViTConfig)  # noqa: S101 - a type: each class is built from its own config
        return cls(build_encoder, region=own.region, **options_of(config, own))

    def before_step(self, at: Progress) -> None:
        """Forget the sums of a forward that no step has followed."""
        super().before_step(at)
        if self.region:
            self._region_centring.forget()

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """Online: class features of all crops [b, V, E], then the tokens of neighbouring crops of
        one size, [b, n, L, E] for each size. Target: those of the large crops, [b, 2, E] and
        [b, 2, L, E].

        Raises:
            ValueError: if there are fewer than two crops.
        """
        if not self.region:
            return super().features(inputs, at, target=target)
        with part(QUERY_FORWARD):
            online = _passed(inputs, self.encoder.regions)
        if not target:
            return Features(online)
        with torch.no_grad(), part(KEY_FORWARD):
            return Features(online, _passed(large(inputs), self.momentum_encoder.regions))

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """Heads and loss of the batch or of a chunk of it; arguments as of `DINO.compare`, features
        as of `features`."""
        if not self.region:
            return super().compare(features, at, accuracy=accuracy)
        (rows, *tokens), (target_rows, target_tokens) = features.online, features.target
        views = super().compare(Features((rows,), (target_rows,)), at, accuracy=accuracy)
        with torch.no_grad(), part(KEY_FORWARD):
            teacher = self.momentum_region_head(target_tokens.flatten(1, 2))
            self._add_regions(teacher)
        with part(QUERY_FORWARD):
            online = self.region_head(_of_image(tokens))
        with part(LOSS):
            regions = soft_cross_entropy_of_pairs(
                online.unit,
                online.weight,
                teacher.unit,
                teacher.weight,
                region_pairs(tokens, target_tokens),
                temperature=self.temperature,
                target_temperature=self.teacher_temperature(at),
                centre=self.region_center.to(teacher.unit.dtype),
            )
        return self._both(views, regions)

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """The same written out: each pair of a large crop and another crop has its own terms, with
        the targets of all its tokens."""
        if not self.region:
            return super().reference(inputs, at, accuracy=accuracy)
        rows, *tokens = _passed(inputs, self.encoder.plain_regions)
        with torch.no_grad():
            target_rows, target_tokens = _passed(large(inputs), self.momentum_encoder.plain_regions)
        views = self._plain_views(rows, target_rows, at, accuracy)
        with torch.no_grad():
            teacher = self.momentum_region_head(target_tokens.flatten(1, 2))
            self._add_regions(teacher)
            outputs = teacher.unit @ teacher.weight.T - self.region_center
            targets = (outputs / self.teacher_temperature(at)).softmax(-1)
        online = self.region_head(_of_image(tokens))
        log_shares = (online.unit @ online.weight.T / self.temperature).log_softmax(-1)
        crops = [crop for group in tokens for crop in group.detach().unbind(1)]
        predictions = log_shares.split([crop.shape[1] for crop in crops], dim=1)
        terms = []
        for q, own in enumerate(targets.chunk(LARGE, dim=1)):
            for v, (crop, predicted) in enumerate(zip(crops, predictions, strict=True)):
                if v == q:
                    continue
                cosines = F.cosine_similarity(crop[:, :, None], target_tokens[:, None, q], dim=-1)
                best = cosines.argmax(-1)[..., None].expand(-1, -1, own.shape[-1])
                terms.append(-(own.gather(1, best) * predicted).sum(-1).mean())
        return self._both(views, torch.stack(terms).mean())

    @torch.no_grad()
    def after_step(self, skipped: Tensor | None, at: Progress) -> None:
        """Move both centres towards the means of the raw outputs, over all chunks and ranks."""
        super().after_step(skipped, at)
        if self.region:
            self._region_centring.move_(self.region_center, skipped)

    def averages(self) -> dict[nn.Parameter, Tensor]:
        """Weights of encoder and heads -> those of the momentum encoder and its heads."""
        found = dict(super().averages())
        return found | self._region_average.averages() if self.region else found

    def frozen(self, at: Progress) -> frozenset[str]:
        """The last layers of both heads, in the first epochs."""
        found = super().frozen(at)
        if not (found and self.region):
            return found
        names = (name for name, _ in self.region_head.last_layer.named_parameters())
        return found | {f"region_head.last_layer.{name}" for name in names}

    def _add_regions(self, teacher: HeadRows) -> None:
        """Add raw outputs of tokens to the sums of this step. Their sum is that of their rows times
        the last layer."""
        summed = scores(teacher.unit.sum((0, 1))[None], teacher.weight)
        self._region_centring.add(summed, teacher.unit.shape[:2].numel())

    def _both(self, views: Output, regions: Tensor) -> Output:
        """The loss of views and regions, and what telemetry sees."""
        watch = {
            **views.watch,
            "view_loss": views.loss.detach(),
            "region_loss": regions.detach(),
            "region_center_norm": torch.linalg.vector_norm(self.region_center),
        }
        return Output((views.loss + regions) / 2, watch)


@torch.no_grad()
def region_pairs(tokens: Sequence[Tensor], target_tokens: Tensor) -> Tensor:
    """The weight of each pair of a token of the encoder and one of the momentum encoder in the loss.

    A token of crop v has one pair for each large crop q that is another one: the token of q with
    the largest cosine, the first of equal ones. Weights are such that the loss is a mean over
    images, pairs of crops, and tokens of the crop.

    Args:
        tokens: [b, n, L, E] of neighbouring crops of one size, for each size.
        target_tokens: [b, 2, L, E] of the large crops.

    Returns:
        [b, R, 2 L], R the tokens of all crops of an image, at least float32; 0 for what is no pair.
    """
    rows, targets = (_units(each) for each in (_of_image(tokens), target_tokens.flatten(1, 2)))
    with torch.autocast(rows.device.type, enabled=False):
        cosines = rows @ targets.mT
    counts = [group.shape[2] for group in tokens for _ in range(group.shape[1])]
    terms = LARGE * (len(counts) - 1) * len(rows)
    found = torch.zeros_like(cosines)
    for q, (alike, pairs) in enumerate(
        zip(cosines.chunk(LARGE, -1), found.chunk(LARGE, -1), strict=True)
    ):
        weights = [
            cosines.new_full((count, 1), 0.0 if v == q else 1 / (terms * count))
            for v, count in enumerate(counts)
        ]
        best = alike.argmax(-1, keepdim=True)
        pairs.scatter_(-1, best, torch.cat(weights).expand_as(best))
    return found


def _units(tokens: Tensor) -> Tensor:
    """Rows of unit length, at least float32."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return F.normalize(tokens.detach().to(wide), dim=-1, eps=1e-12)


def _of_image(tokens: Sequence[Tensor]) -> Tensor:
    """[b, R, E]: all tokens of an image, crop by crop."""
    return torch.cat([group.flatten(1, 2) for group in tokens], dim=1)


def _passed(inputs: Inputs, encode: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """Class features [b, V, E] of all crops, then the tokens [b, n, L, E] of each size."""
    rows, tokens = zip(*each_size(inputs, encode, LARGE), strict=True)
    pooled = torch.cat([by_image(each, inputs) for each in rows], dim=1)
    return (pooled, *(by_image(each, inputs) for each in tokens))
