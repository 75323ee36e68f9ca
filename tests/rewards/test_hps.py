"""HPS: parity with the original, every key of the published files, and loading from open_clip's layout."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vader_nodes.tools.parity import clip as parity
from vader_nodes.tools.parity.__main__ import compare
from vader_nodes.tools.parity.fixtures import read
from vader_nodes.vader_backend.config import InputError
from vader_nodes.vader_backend.mini.recipe.tokenizer import save_tokenizer
from vader_nodes.vader_backend.rewards._clip import ClipReward, build_open_clip
from vader_nodes.vader_backend.rewards.hps import Config, build

from .conftest import PROMPTS, video

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The fixture's weights, made for as many words as the small tokenizer has; its logit scale is 100."""
    own = read(FIXTURES / "hpsv2.safetensors").weights
    words = len(save_tokenizer(tmp_path_factory.mktemp("words")))
    embedding = torch.randn(words, own["token_embedding.weight"].shape[1])
    return {**own, "token_embedding.weight": embedding, "logit_scale": torch.tensor(100.0).log()}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor]) -> Path:
    """HPS_v2_compressed.pt, as it is published, with its tokenizer beside it."""
    root = tmp_path_factory.mktemp("hps")
    torch.save({"epoch": 1, "state_dict": tensors}, root / "HPS_v2_compressed.pt")
    save_tokenizer(root / "tokenizer")
    return root / "HPS_v2_compressed.pt"


def make(path: Path, **settings: Any) -> ClipReward:
    return build(Config(checkpoint=str(path), **settings))


# --- the original ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2_default_heads"])
def test_it_equals_the_original_implementation(name: str) -> None:
    results = compare(read(FIXTURES / f"{name}.safetensors"), parity.hpsv2)
    assert {name for name, _, _ in results} == {"resized", "image_features", "text_features", "scores", "loss"}
    assert all(ok for _, _, ok in results), results


def test_every_weight_of_the_published_files_is_used() -> None:
    listed = json.loads(gzip.decompress((FIXTURES / "clip_keys.json.gz").read_bytes()))["hpsv2"]
    tensors = {key: torch.empty(shape, device="meta") for key, shape in listed["keys"].items()}
    model = build_open_clip(tensors, torch.float32, Path("HPS_v2_compressed.pt"))
    assert sum(p.numel() for p in model.parameters()) == listed["n_params"]
    vision, text = model.config.vision_config, model.config.text_config
    assert (vision.image_size, vision.num_hidden_layers, vision.num_attention_heads) == (224, 32, 16)
    assert (text.max_position_embeddings, text.num_hidden_layers, text.num_attention_heads) == (77, 24, 16)
    assert (vision.hidden_act, text.hidden_act, model.config.projection_dim) == ("gelu", "gelu", 1024)


# --- files and folders -----------------------------------------------------------------------


def test_a_file_and_a_folder_score_alike(path: Path, tmp_path: Path) -> None:
    from_file = make(path)
    from_file.clip.model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    scores = [reward(video(), PROMPTS, [0, 1]) for reward in (from_file, make(tmp_path))]
    torch.testing.assert_close(*scores)
    assert float((scores[0][0] - scores[0][1]).abs()) > 1e-3


def test_a_file_of_distributed_training_scores_alike(path: Path, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in tensors.items()}}, tmp_path / "HPS.pt")
    save_tokenizer(tmp_path)
    assert torch.equal(*(reward(video(), PROMPTS, [0, 1]) for reward in (make(path), make(tmp_path / "HPS.pt"))))


def test_half_precision_halves_the_weights_but_not_the_scale(path: Path) -> None:
    clip = video().requires_grad_()
    whole, half = make(path), make(path, dtype="bfloat16")
    assert {p.dtype for p in half.clip.model.parameters() if p.dim()} == {torch.bfloat16}
    assert float(half.clip.model.logit_scale.exp()) == pytest.approx(100, rel=1e-6)
    score = half(clip, PROMPTS, [0, 1])
    assert score.dtype == torch.float32
    assert 0 < float((score - whole(clip, PROMPTS, [0, 1])).detach().abs().max()) < 0.03
    assert torch.autograd.grad(score.sum(), clip)[0].flatten(2).any(2).all()


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_the_fit_can_be_chosen(path: Path, fit: str) -> None:
    squashed, other = make(path), make(path, fit=fit)
    wide, square = video(2, 20, 44), video(2, 28, 28)
    assert torch.equal(squashed(square, PROMPTS, [0, 1]), other(square, PROMPTS, [0, 1]))
    assert float((squashed(wide, PROMPTS, [0, 1]) - other(wide, PROMPTS, [0, 1])).abs().max()) > 1e-4


def test_the_tokenizer_lies_beside_the_file_or_is_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": tensors}, path)
    with pytest.raises(InputError, match=r"HPS_v2.1_compressed.pt has no tokenizer: put CLIP's vocab.json"):
        make(path)
    save_tokenizer(tmp_path / "words")
    named = make(path, tokenizer=str(tmp_path / "words"))
    save_tokenizer(tmp_path)
    assert torch.equal(make(path)(video(), PROMPTS, [0, 1]), named(video(), PROMPTS, [0, 1]))
    torch.save({"state_dict": read(FIXTURES / "hpsv2.safetensors").weights}, path)
    with pytest.raises(InputError, match=r"tokens, HPS_v2.1_compressed.pt's text encoder 89"):
        make(path)


# --- what is refused -------------------------------------------------------------------------


def test_other_checkpoints_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], head_tensors: dict[str, Tensor]
) -> None:
    path = tmp_path / "other.pt"
    save_tokenizer(tmp_path)
    foreign = read(FIXTURES / "viclip.safetensors").weights
    lacking = {key: tensor for key, tensor in tensors.items() if key != "visual.ln_pre.bias"}
    misshapen = {**tensors, "visual.ln_pre.bias": torch.zeros(3)}
    for wrong in (foreign, head_tensors, lacking, misshapen, {**tensors, "more": torch.zeros(2)}):
        torch.save({"state_dict": wrong}, path)
        with pytest.raises(InputError, match=r"CLIP model in .* cannot be read"):
            make(path)
    torch.save({"state_dict": tensors}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"CLIP model in .* cannot be read"):
        make(path)


class _Intruder:
    """Touches a file when it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save({"state_dict": tensors, "extra": _Intruder(tmp_path / "mark")}, tmp_path / "HPS.pt")
    with pytest.raises(InputError, match="could run code"):
        make(tmp_path / "HPS.pt")
    assert not (tmp_path / "mark").exists()
