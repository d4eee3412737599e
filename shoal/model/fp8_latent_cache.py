"""The plain cache with its entries in FP8: 656 bytes a token and layer at V3's widths, in the place of 1152.

Entries are quantised when they are written and multiplied out when they are read: here, on any device, or by the packed
CPU pass itself (`kernels/cpu/fp8_entries.h`).
"""

import torch
from torch import Tensor

from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.model.latent_cache import LatentCache
from shoal.quant.latent import entry_bytes, pack_entries, unpack_entries


class Fp8LatentCache(LatentCache):
    """Entries `[layers, rows, positions, bytes]`; everything but reading and writing is that of the plain cache.

    Raises:
        ConfigError: the model has no latents to cache.
    """

    def __init__(
        self, config: ModelConfig, num_rows: int, num_positions: int, *, device: torch.device | str = "cpu"
    ) -> None:
        if config.attention != "mla":
            raise ConfigError(
                f"an FP8 latent cache needs latent attention; this model has attention={config.attention!r}."
            )
        super().__init__(config, num_rows, 0, dtype=torch.uint8, device=device)
        self._latent = config.kv_lora_rank
        width = entry_bytes(config.kv_lora_rank, config.qk_rope_head_dim)
        self.entry_LBTW = torch.zeros(
            config.num_hidden_layers, num_rows, num_positions, width, dtype=torch.uint8, device=device
        )
        self.num_visible = num_positions

    def append(self, layer: int, entry_BSW: Tensor, position_BS: Tensor) -> Tensor:
        """Write the new entries; return all visible ones `[B, T, W]`, multiplied out."""
        packed = pack_entries(entry_BSW.float(), self._latent)
        return unpack_entries(super().append(layer, packed, position_BS), self._latent)
