"""The recipe of the mini Open-Sora: its tokenizer, its layout on disk, and what its parts are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vader_nodes.vader_backend.mini import oracle
from vader_nodes.vader_backend.mini.recipe import opensora as recipe
from vader_nodes.vader_backend.mini.recipe import opensora_autoencoder as autoencoder
from vader_nodes.vader_backend.mini.recipe.opensora_text import save_t5_tokenizer
from vader_nodes.vader_backend.mini.recipe.tokenizer import MAX_TOKENS
from vader_nodes.vader_backend.mini.recipe.vae import new_vae
from vader_nodes.vader_backend.mini.world import ALL_SCENES
from vader_nodes.vader_backend.models import opensora
from vader_nodes.vader_backend.models._t5 import load_tokenizer
from vader_nodes.vader_backend.rng import generator


def test_every_word_of_a_scored_caption_is_one_token(tmp_path: Path) -> None:
    save_t5_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for scene in ALL_SCENES:
        text = opensora.scored(scene.caption)
        ids = tokenizer.ids(text)
        assert len(ids) == len(text.split()) < MAX_TOKENS
        assert tokenizer.text(ids) == text


def test_other_text_becomes_letters(tmp_path: Path) -> None:
    size = save_t5_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.text(tokenizer.ids("two zebras, 7 of them")) == "two zebras, 7 of them"
    assert max(tokenizer.ids("日本 ñandú")) < size
    assert (tokenizer.pad, tokenizer.end) == (0, 1)


def test_the_oracle_reads_17_frames() -> None:
    for scenes, video in autoencoder.renders(generator("test", "oracle"), 40, ALL_SCENES):
        frames = (video / 2 + 0.5).transpose(1, 2)
        assert frames.shape == (40, 17, 3, 64, 64)
        assert oracle.accuracy(frames, scenes)["mean"] == 1


@torch.no_grad()
def test_the_image_autoencoder_only_changes_its_units() -> None:
    images = new_vae().eval()
    vae = autoencoder.new_video_autoencoder(images)
    video = torch.rand(1, 3, 2, 64, 64) * 2 - 1
    frames = video[0].transpose(0, 1)
    latents = images.encode(frames).latent_dist.mean
    seen = vae.encode_images(video)
    torch.testing.assert_close(seen[0].transpose(0, 1), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        vae.decode_images(seen)[0].transpose(0, 1), images.decode(latents).sample, rtol=1e-3, atol=1e-4
    )


def test_trainings_of_a_step_write_a_checkpoint_that_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (autoencoder, recipe):
        monkeypatch.setattr(module, "_POOL", 3)
        monkeypatch.setattr(module, "_BATCH", 2)
    vae = autoencoder.train_video_autoencoder(new_vae(), tmp_path, steps=1)
    _, video = next(autoencoder.renders(generator(0, "opensora_autoencoder", "pool"), 3, ALL_SCENES))
    latents = vae.encode(video)
    assert latents.shape == (3, 4, 5, 8, 8)
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(4), rtol=0, atol=0.1)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(4), rtol=0, atol=0.1)

    folder = tmp_path / "weights"
    model = recipe.train_opensora(vae, tmp_path, folder / "tokenizer", steps=1, motion_steps=1)
    recipe.save_opensora(model, vae, folder)
    opened = opensora.build(opensora.Config(folder=str(folder)))
    assert opensora.matches(folder)
    assert opened.defaults == opensora.MINI
    assert opened.latent_shape(opensora.MINI.video, 3) == latents.shape
    opened.check(opensora.MINI.video)

    cond = opened.encode([scene.caption for scene in ALL_SCENES[:3]], opensora.MINI.video)
    trained = model.denoiser.half().float()(latents, torch.full((3,), 500.0), *cond.positive.values())
    assert trained.abs().max() > 0
    torch.testing.assert_close(opened.predict(latents, 500.0, dict(cond.positive)), trained)
    torch.testing.assert_close(opened.encode_video((video / 2 + 0.5).transpose(1, 2)), latents, rtol=0, atol=0.05)


def test_chosen_rows_get_the_noisiest_times() -> None:
    noisy = torch.arange(16) % 3 == 0
    times = torch.stack([recipe._times(noisy, generator("times", i)) for i in range(50)])
    assert times.min() > 0
    assert times.max() <= 1000
    assert times[:, noisy].min() >= 850
    assert times[:, ~noisy].min() < 300
