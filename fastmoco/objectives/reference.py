"""MoCo v3's forward by the book: the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from fastmoco.distributed.gather import gather_keys
from fastmoco.distributed.mesh import group_rank
from fastmoco.models.vit import VisionTransformer
from fastmoco.objectives.moco_v3 import MoCoV3, MoCoV3Output


def plain_forward(objective: MoCoV3, view1: Tensor, view2: Tensor, *, accuracy: bool = False) -> MoCoV3Output:
    """What ``objective(view1, view2)`` computes, with nothing saved and nothing fused.

    Each encoder embeds and encodes each view alone, every block sees every token, and the loss is written out:
    ``2 * temperature * CE(u(q) u(keys)^T / temperature, rank * B + i)``, summed over both directions. Like a forward,
    it moves the running averages of the batch norms.

    Args:
        objective: in training mode.
        view1: [B, 3, H, W].
        view2: [B, 3, H, W].
        accuracy: whether the output has one.

    Returns:
        As ``MoCoV3.forward``.
    """

    def encode(encoder: VisionTransformer, view: Tensor) -> Tensor:
        projected: Tensor = encoder.head(encoder.encode_plain(encoder.patch_tokens(view)))
        return projected

    def loss(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        logits = normalize(q, dim=1) @ gather_keys(normalize(k, dim=1)).T / objective.temperature
        positives = group_rank() * q.shape[0] + torch.arange(q.shape[0], device=q.device)
        found = logits.topk(min(5, logits.shape[1]), dim=1).indices == positives[:, None]
        shares = torch.stack([found[:, :1].any(1).to(q.dtype).mean(), found.any(1).to(q.dtype).mean()])
        return 2 * objective.temperature * cross_entropy(logits, positives), shares

    q1 = objective.predictor(encode(objective.encoder, view1))
    q2 = objective.predictor(encode(objective.encoder, view2))
    with torch.no_grad():
        k1 = encode(objective.momentum_encoder, view1)
        k2 = encode(objective.momentum_encoder, view2)
    (loss1, shares1), (loss2, shares2) = loss(q1, k2), loss(q2, k1)
    return MoCoV3Output(loss1 + loss2, q1, q2, k1, k2, (shares1 + shares2) / 2 if accuracy else None)
