"""Exponential moving averages of weights that several objectives share: the momentum encoder, and
the average of any other module.

Parts, not base classes: an objective makes one of its two modules and asks it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastmoco.models.encoder import Coupling, Encoder, TokenEncoder, with_heads
from fastmoco.objectives.interface import Features, Inputs, Progress
from fastmoco.objectives.view_pairs import two_views
from fastmoco.optim.schedule import ema_momentum
from fastmoco_pipelines.loading.step_parts import KEY_FORWARD, QUERY_FORWARD, part


class Average:
    """A module and the exponential moving average of its weights.

    Only parameters are averaged; buffers, as those of batch norms, are each module's own.

    Args:
        module: whose weights the other one copies.
        average: of equal shapes; loses its gradient.
        start: momentum of the average at step 0.
        schedule: "cosine" rises to 1 at the end of the run, "constant" stays.
    """

    def __init__(
        self,
        module: nn.Module,
        average: nn.Module,
        *,
        start: float,
        schedule: Literal["cosine", "constant"],
    ) -> None:
        self._pair = (module, average)
        self._start = start
        self._schedule = schedule
        average.requires_grad_(False)
        with torch.no_grad():
            for copy, own in zip(average.parameters(), module.parameters(), strict=True):
                copy.copy_(own)

    def averages(self) -> dict[nn.Parameter, Tensor]:
        """Parameter -> its average, frozen ones included."""
        module, average = self._pair
        return dict(zip(module.parameters(), average.parameters(), strict=True))

    def value(self, step: int, at: Progress) -> float:
        """The momentum of the average at a step of the run of `at`, m(step)."""
        return ema_momentum(
            step,
            start=self._start,
            epochs=at.epochs,
            steps_per_epoch=at.steps_per_epoch,
            schedule=self._schedule,
        )

    def next_value(self, at: Progress) -> float | None:
        """The momentum of the next step, m(t + 1), of methods that average before a step's forward;
        None at the end of the last step."""
        following = at.step + 1
        return self.value(following, at) if following < at.total_steps else None


class Momentum(Average):
    """An encoder and its momentum encoder.

    Both run in training mode: the momentum encoder normalises by the statistics of its own batch
    and keeps its own running averages; only parameters are averaged.

    Args:
        encoder: whose weights the other one copies.
        momentum_encoder: of equal shapes; loses its gradient.
        start: momentum of the average at step 0.
        schedule: "cosine" rises to 1 at the end of the run, "constant" stays.

    Attributes:
        coupling: of an objective whose heads couple images: that of the trunk, if it does too.
    """

    def __init__(
        self,
        encoder: Any,
        momentum_encoder: Any,
        *,
        start: float,
        schedule: Literal["cosine", "constant"],
    ) -> None:
        super().__init__(encoder, momentum_encoder, start=start, schedule=schedule)
        self.encoder = encoder
        self.momentum_encoder = momentum_encoder
        self.coupling = with_heads(encoder)
        self._stems_equal = True
        self._stems_compared: tuple[tuple[int, int, int], ...] | None = None

    def shares_tokens(self) -> bool:
        """Whether both encoders must give the same patch tokens: their stems are frozen and equal.

        The comparison reads the device, so it runs only where one of the tensors has been replaced
        or written since.
        """
        if not _embeds(self.encoder):
            return False
        own, average = self.encoder.stem_tensors(), self.momentum_encoder.stem_tensors()
        if any(tensor.requires_grad for tensor in own):
            return False
        now = self._stems()
        if now != self._stems_compared:
            # Tensors without memory have nothing to read: there a copy counts as equal.
            self._stems_equal = isinstance(own[0], FakeTensor) or all(
                torch.equal(a, b) for a, b in zip(own, average, strict=True)
            )
            self._stems_compared = now
        return self._stems_equal

    def features(self, inputs: Inputs, *, target: bool = True, taps: bool = False) -> Features:
        """Both views through both encoders: [b, 2, E] of the encoder, and of the momentum encoder
        without gradient.

        Both views pass a trunk as one batch where it couples no images. Patch tokens are computed
        once for both encoders where they must be the same.

        Args:
            inputs: two views of one shape.
            target: whether the momentum encoder's are wanted.
            taps: whether those of the encoder are wanted after every block, [b, 2, depth, E].

        Raises:
            ValueError: if the views differ in shape, or are not two.
        """
        view1, view2 = two_views(inputs)
        views = (view1, view2)
        tokens = None
        with part(QUERY_FORWARD):
            if self.shares_tokens():
                tokens = self.encoder.patch_tokens(torch.cat(views))
            online = _class_features(self.encoder, views, tokens, inputs, taps=taps)
        if not target:
            return Features((online,))
        with torch.no_grad(), part(KEY_FORWARD):
            return Features((online,), (_class_features(self.momentum_encoder, views, tokens),))

    def _stems(self) -> tuple[tuple[int, int, int], ...]:
        """Which memory the stems are in, and how often it has been written."""
        if not _embeds(self.encoder):
            return ()
        tensors = self.encoder.stem_tensors() + self.momentum_encoder.stem_tensors()
        return tuple((t.untyped_storage()._cdata, t.storage_offset(), t._version) for t in tensors)


def _couples(encoder: Encoder) -> bool:
    return encoder.coupling is Coupling.TRUNK


def _embeds(encoder: Encoder) -> bool:
    """Whether an encoder turns images into patch tokens that another one could share."""
    return not _couples(encoder) and hasattr(encoder, "stem_tensors")


def _class_features(
    encoder: TokenEncoder,
    views: tuple[Tensor, Tensor],
    tokens: Tensor | None,
    trained: Inputs | None = None,
    *,
    taps: bool = False,
) -> Tensor:
    """[b, 2, E] features, or [b, 2, depth, E] after every block.

    Args:
        encoder: one of the two.
        views: both views.
        tokens: the patch tokens of both, where encoders share them.
        trained: the inputs, for the encoder that trains: its residual branches are those of
            `paths`.
        taps: whether features after every block are wanted.
    """
    encode = encoder.taps if taps else encoder
    paths = (trained or Inputs(views)).paths_of
    if _couples(encoder):
        rows = [encode(view, *paths(number)) for number, view in enumerate(views)]
        return torch.stack(rows).transpose(0, 1)
    # Not shared: FSDP2 gathers a stem that trains only inside the forward of its encoder.
    if tokens is None:
        features = encode(torch.cat(views), *paths(0, 1))
    else:
        of_tokens = encoder.encode_taps if taps else encoder.encode
        features = of_tokens(tokens, *paths(0, 1))
    return features.view(2, views[0].shape[0], *features.shape[1:]).transpose(0, 1)
