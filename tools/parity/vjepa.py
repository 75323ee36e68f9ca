"""V-JEPA: encoders and predictor from their original keys, and the masked loss."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...vader_backend.rewards._vjepa import normalised, take
from ...vader_backend.rewards._vjepa_original import build_vjepa
from ...vader_backend.rewards.vjepa import distance
from .fixtures import Fixture


def vjepa(fixture: Fixture) -> dict[str, Tensor]:
    """Every stage, for each pair of masks, and the encoder on videos of another size."""
    network = build_vjepa(fixture.weights, Path(fixture.name), heads=fixture.config["model"]["num_heads"])
    clips, exponent = fixture.inputs["clips"], fixture.config["loss"]["loss_exp"]
    full = network.target_encoder(clips)
    outputs = {"target_full": full, "target_normed": normalised(full), "enc_full": network.encoder(clips)}
    losses: list[Tensor] = []
    while f"masks_enc_{len(losses)}" in fixture.inputs:
        kind = len(losses)
        seen, hidden = (fixture.inputs[f"masks_{name}_{kind}"] for name in ("enc", "pred"))
        target, predicted = take(network.targets(clips), hidden), network.predict(clips, seen, hidden, kind)
        outputs |= {f"h_{kind}": target, f"ctx_{kind}": network.encoder(clips, seen), f"z_{kind}": predicted}
        losses.append(distance(predicted, target, exponent).mean())
    outputs |= {"loss_pairs": torch.stack(losses), "loss": torch.stack(losses).mean()}
    if "clips_other_size" in fixture.inputs:
        outputs["enc_other_size"] = network.encoder(fixture.inputs["clips_other_size"])
    return outputs


RUN = {"vjepa": vjepa}
