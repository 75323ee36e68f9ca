"""Run by test_trainer.py as a process of its own, so that it can be killed or launched twice.

train_worker.py align FOLDER            20 steps; prints «step N», writes FOLDER/digest at the end
train_worker.py gradient FOLDER BATCH   one update in float64; each process writes the gradient it applied
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch

os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parent))
import conftest  # noqa: F401
from safetensors.torch import save_file
from tiny import Brightness, tiny_model
from vader_nodes.vader_backend.align import Settings, align
from vader_nodes.vader_backend.generate import VideoConfig
from vader_nodes.vader_backend.lora import LoraConfig, attached
from vader_nodes.vader_backend.objectives import vader
from vader_nodes.vader_backend.prompts import PromptSet
from vader_nodes.vader_backend.trainer import Hooks, TrainOptions, new_accelerator, train

PROMPTS = PromptSet(("a red circle", "a blue square", "a green cross"), ())


def run_align(folder: Path) -> None:
    torch.set_num_threads(1)
    settings = Settings(
        vader.Config(sampling_steps=3, guidance=2.0),
        lora=LoraConfig(rank=2, dropout=0.1),
        train=TrainOptions(
            steps=20, learning_rate=0.02, save_every=1, ema_decay=0.9, warmup_steps=3, lr_schedule="cosine"
        ),
        video=VideoConfig(3, 8, 8),
    )
    hooks = Hooks(progress=lambda result, total, metrics: print(f"step {result.step}", flush=True))
    model = tiny_model(folder, torch.float32)
    result = align(model, Brightness(), PROMPTS, settings, root=folder / "runs", hooks=hooks)
    digest = hashlib.sha256()
    for name, tensor in sorted(result.lora.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    (folder / "digest").write_text(digest.hexdigest() + str(result.losses))


def run_gradient(folder: Path, batch_size: int) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(folder / f"model_{rank}")
    options = TrainOptions(steps=1, batch_size=batch_size, max_grad_norm=0.0)
    applied: dict[str, torch.Tensor] = {}
    with attached(model, LoraConfig(rank=2), seed=0) as parameters:
        for parameter in parameters.values():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
        objective = vader.build(
            vader.Config(sampling_steps=3, guidance=2.0), model, Brightness(), PROMPTS,
            VideoConfig(3, 8, 8).resolve(model), seed=0,
        )  # fmt: skip
        step = torch.optim.AdamW.step

        def spy(optimizer: torch.optim.AdamW, *arguments: object) -> object:
            applied.update({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
            return step(optimizer, *arguments)

        torch.optim.AdamW.step = spy  # type: ignore[method-assign, assignment]
        train(parameters, objective, options, learning_rate=0.1, accelerator=new_accelerator(model.device))
    save_file(applied, folder / f"gradient_{rank}.safetensors")


if __name__ == "__main__":
    if sys.argv[1] == "align":
        run_align(Path(sys.argv[2]))
    else:
        run_gradient(Path(sys.argv[2]), int(sys.argv[3]))
