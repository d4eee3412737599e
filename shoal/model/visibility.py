"""What each position may attend to, said once per forward pass and read by every layer.

Two cases. Without a cache a row is one or several packed documents, and a position sees its own document up to itself:
`first_BS` says where that document begins. With a cache a new position sees every cached position up to its own: a mask.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shoal.model.latent_cache import LatentCache


@dataclass
class Visibility:
    """Exactly one of the two is set."""

    first_BS: Tensor | None = None
    """First position of the row that each position sees, int64."""
    cache_mask_BST: Tensor | None = None
    """True where a new position sees a cached one."""

    @cached_property
    def mask_BST(self) -> Tensor | None:
        """The same as a mask; None where plain causal attention says it all."""
        if self.first_BS is None:
            return self.cache_mask_BST
        if not bool(self.first_BS.any()):
            return None
        position_S = torch.arange(self.first_BS.shape[1], device=self.first_BS.device)
        return (position_S >= self.first_BS.unsqueeze(-1)) & (position_S <= position_S.unsqueeze(-1))


def visibility_of(
    token_BS: Tensor, document_BS: Tensor | None, position_BS: Tensor, cache: LatentCache | None
) -> Visibility:
    """What the positions of this forward pass see.

    Args:
        document_BS: document number of each position, equal neighbours share one; None: the row is one document.
    """
    if cache is not None:
        return Visibility(cache_mask_BST=cache.visible_mask_BST(position_BS))
    if document_BS is None:
        return Visibility(first_BS=torch.zeros_like(token_BS))
    index_S = torch.arange(document_BS.shape[1], device=document_BS.device)
    begins_BS = torch.ones_like(document_BS, dtype=torch.bool)
    begins_BS[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    return Visibility(first_BS=(index_S * begins_BS).cummax(dim=1).values)
