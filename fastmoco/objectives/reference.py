"""MoCo v3's forward by the book: the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from fastmoco.distributed.gather import gather_keys
from fastmoco.distributed.mesh import group_rank
from fastmoco.models.vit import VisionTransformer
from fastmoco.objectives.moco_v3 import MoCoV3, MoCoV3Output


def plain_forward(objective: MoCoV3, view1: Tensor, view2: Tensor) -> MoCoV3Output:
    """What ``objective(view1, view2)`` computes, with nothing saved and nothing fused.

    Each encoder embeds and encodes each view alone, every block sees every token, and the loss is written out:
    ``2 * temperature * CE(u(q) u(keys)^T / temperature, rank * B + i)``, summed over both directions. Like a forward,
    it moves the running averages of the batch norms.

    Args:
        objective: in training mode.
        view1: [B, 3, H, W].
        view2: [B, 3, H, W].

    Returns:
        As ``MoCoV3.forward``.
    """

    def encode(encoder: VisionTransformer, view: Tensor) -> Tensor:
        projected: Tensor = encoder.head(encoder.encode_plain(encoder.patch_tokens(view)))
        return projected

    def loss(q: Tensor, k: Tensor) -> Tensor:
        logits = normalize(q, dim=1) @ gather_keys(normalize(k, dim=1)).T / objective.temperature
        positives = group_rank() * q.shape[0] + torch.arange(q.shape[0], device=q.device)
        return 2 * objective.temperature * cross_entropy(logits, positives)

    q1 = objective.predictor(encode(objective.encoder, view1))
    q2 = objective.predictor(encode(objective.encoder, view2))
    with torch.no_grad():
        k1 = encode(objective.momentum_encoder, view1)
        k2 = encode(objective.momentum_encoder, view2)
    return MoCoV3Output(loss(q1, k2) + loss(q2, k1), q1, q2, k1, k2)
