"""V-JEPA 2 of transformers, seen as V-JEPA: what it predicts of hidden places from the seen ones alone.

VJEPA2Model's own forward encodes the whole video before it hides anything, so its parts are called here.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import VJEPA2Model

from ._vjepa import normalised, take

_MOST_FRAMES = 16  # what V-JEPA takes; trained on up to 64, these networks take any number


class Vjepa2(nn.Module):
    """The published checkpoint holds one encoder, the moving average; it gives targets and context alike."""

    def __init__(self, model: VJEPA2Model) -> None:
        super().__init__()
        self.model = model

    @property
    def cell(self) -> tuple[int, int]:
        """Frames and pixels of a side that a token stands for."""
        return self.model.config.tubelet_size, self.model.config.patch_size

    @property
    def video(self) -> tuple[int, int]:
        """Frames and pixels of a side to show it by default."""
        return min(self.model.config.frames_per_clip, _MOST_FRAMES), self.model.config.crop_size

    def targets(self, clips_BCTHW: Tensor) -> Tensor:
        """What is to be predicted: [B, N, D] of mean 0 and variance 1."""
        return normalised(self._encode(clips_BCTHW, None))

    def predict(self, clips_BCTHW: Tensor, seen_BK: Tensor, hidden_BM: Tensor, kind: int) -> Tensor:
        """Features [B, M, D] of the hidden places from the seen ones; kind: number of the mask setting."""
        predictor = self.model.predictor
        context = self._encode(clips_BCTHW, seen_BK)
        tokens, places = predictor.embeddings(context, [seen_BK], [hidden_BM], mask_index=kind)
        for layer in predictor.layer:
            tokens = layer(tokens, places)[0]
        return predictor.proj(predictor.layernorm(tokens)[:, seen_BK.shape[1] :])

    def _encode(self, clips_BCTHW: Tensor, seen_BK: Tensor | None) -> Tensor:
        encoder = self.model.encoder
        tokens = encoder.embeddings(clips_BCTHW.transpose(1, 2))
        if seen_BK is not None:
            tokens = take(tokens, seen_BK)
        for layer in encoder.layer:
            tokens = layer(tokens, seen_BK)[0]
        return encoder.layernorm(tokens)
