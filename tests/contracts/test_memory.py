"""Every memory trick, alone, in pairs and all together: the gradients stay, less memory is held, gone on exit."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.resnet import TemporalResnetBlock
from tiny import Brightness
from tiny_families import VARIANTS, Tiny
from torch import Tensor, nn
from vader_nodes.vader_backend.lora import LoraConfig, attached
from vader_nodes.vader_backend.memory import low_bit as packing
from vader_nodes.vader_backend.memory import sliced_decode
from vader_nodes.vader_backend.memory.block_swap import block_swap
from vader_nodes.vader_backend.memory.gradient_checkpointing import gradient_checkpointing
from vader_nodes.vader_backend.memory.graph_offload import _Shelf, graph_offload
from vader_nodes.vader_backend.memory.idle_offload import idle_offload
from vader_nodes.vader_backend.memory.low_bit import STORAGES, frozen_weights, low_bit
from vader_nodes.vader_backend.memory.one_by_one import one_by_one
from vader_nodes.vader_backend.memory.options import PRESETS, MemoryConfig, tricks
from vader_nodes.vader_backend.memory.stepwise import stepwise
from vader_nodes.vader_backend.memory.tiled_decode import tiled_decode
from vader_nodes.vader_backend.models.base import VideoModel
from vader_nodes.vader_backend.objectives import vader
from vader_nodes.vader_backend.objectives.base import Batch
from vader_nodes.vader_backend.prompts import PromptSet

DEVICE = torch.device("cpu")
HOST = torch.device("cpu:0")  # the same memory under another name, so that copies to it are made
PROMPTS = ("a red circle", "the blue square")
EXACT = {
    "gradient_checkpointing": MemoryConfig(gradient_checkpointing=True),
    "stepwise": MemoryConfig(stepwise=True),
    "graph_offload": MemoryConfig(graph_offload=True),
    "offload_idle": MemoryConfig(offload_idle=True),
    "resident_gb": MemoryConfig(resident_gb=1e-6),
}
# One sample at a time, kernels sum in another order, and a LoRA's dropout draws other masks.
ROUNDED = {"one_by_one": MemoryConfig(one_by_one=True), "decode_slices": MemoryConfig(decode_slices=True)}
ROUNDING = 1e-4  # of the largest gradient
PAIRS = list(itertools.combinations({**EXACT, **ROUNDED}, 2))


@dataclass
class Case:
    """A tiny model, and the gradients of one VADER step on it without any trick."""

    model: VideoModel
    tiny: Tiny

    def gradients(
        self, *configs: MemoryConfig, k: int = 2, stop_input: bool = False, dropout: float = 0.2
    ) -> list[Tensor]:
        """Of the LoRA, with the tricks of several settings at once."""
        reward = Scaled()
        config = MemoryConfig()
        for given in configs:
            rest = MemoryConfig()
            config = replace(config, **{n: v for n, v in vars(given).items() if v != getattr(rest, n)})
        with ExitStack() as stack:
            stack.enter_context(tricks(self.model, reward.networks(), config, DEVICE, HOST, smallest=0))
            return self.step(stack, reward, k, stop_input, dropout)

    def step(
        self, stack: ExitStack, reward: Scaled, k: int = 2, stop_input: bool = False, dropout: float = 0.0
    ) -> list[Tensor]:
        shape = LoraConfig(rank=2, alpha=2.0, dropout=dropout)
        parameters = stack.enter_context(attached(self.model, shape, seed=0))
        rng = torch.Generator().manual_seed(2)
        for parameter in parameters.values():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=rng)
        chosen = vader.Config(
            sampling_steps=3, k=k, stop_input=stop_input, reward_frames="even", frame_count=2, guidance=3.0
        )
        prompts = PromptSet(PROMPTS, (), self.tiny.pictures(len(PROMPTS)))
        objective = vader.build(chosen, self.model, reward, prompts, self.tiny.video, seed=3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)  # of the dropout
            loss, _ = objective.loss(Batch(0, (0, 1), (0, 1)))
            return list(torch.autograd.grad(loss, list(parameters.values())))

    @cached_property
    def plain(self) -> list[Tensor]:
        gradients = self.gradients()
        assert all(g.isfinite().all() for g in gradients)
        assert any(g.any() for g in gradients)
        return gradients

    @cached_property
    def undropped(self) -> list[Tensor]:
        return self.gradients(dropout=0.0)


class Scaled(Brightness):
    """Brightness through a frozen network, which a trick may move."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Conv2d(3, 3, 1).requires_grad_(False)

    def networks(self) -> Sequence[nn.Module]:
        return [self.network]

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str], indices: Sequence[int]) -> Tensor:
        seen = self.network(video_BTCHW.flatten(0, 1)).unflatten(0, video_BTCHW.shape[:2])
        return super().__call__(seen, prompts, indices)


@contextmanager
def made(name: str, folder: Path) -> Iterator[Case]:
    VARIANTS[name].write(folder)
    model = VARIANTS[name].build(folder)
    # Kernels round by where a tensor begins: one mapped from a file anywhere, a copy of it at a multiple of 64 bytes.
    for tensor in (tensor for part in model.parts().values() for tensor in part.parameters()):
        tensor.data = tensor.data.clone()
    yield Case(model, VARIANTS[name])


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with made(request.param, tmp_path_factory.mktemp(request.param)) as found:
        yield found


@pytest.fixture(scope="module")
def modelscope(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with made("modelscope", tmp_path_factory.mktemp("modelscope")) as found:
        yield found


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    """Equal to the bit for a tolerance of 0, else within that share of the largest gradient."""
    largest = max(float(g.abs().max()) for g in wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs) if not tolerance else (ours - theirs).abs().max() <= tolerance * largest


# --- gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_a_trick_leaves_the_gradient_to_the_bit(case: Case, name: str) -> None:
    assert_same(case.gradients(EXACT[name]), case.plain, 0)


@pytest.mark.parametrize("name", ROUNDED)
def test_another_order_of_sums_changes_nothing_else(case: Case, name: str) -> None:
    assert_same(case.gradients(ROUNDED[name], dropout=0.0), case.undropped, ROUNDING)


def test_all_tricks_together(case: Case) -> None:
    assert_same(case.gradients(*EXACT.values()), case.plain, 0)
    together = case.gradients(*EXACT.values(), *ROUNDED.values(), dropout=0.0)
    assert_same(together, case.undropped, ROUNDING)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_tricks_together(modelscope: Case, first: str, second: str) -> None:
    two_together(modelscope, first, second)


def two_together(case: Case, first: str, second: str) -> None:
    every = {**EXACT, **ROUNDED}
    if {first, second} <= EXACT.keys():
        assert_same(case.gradients(every[first], every[second]), case.plain, 0)
    else:
        assert_same(case.gradients(every[first], every[second], dropout=0.0), case.undropped, ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_tricks_together_on_every_family(case: Case, first: str, second: str) -> None:
    two_together(case, first, second)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_tricks_does_not_matter(modelscope: Case, seed: int) -> None:
    reward = Scaled()
    each = [
        lambda: gradient_checkpointing(modelscope.model),
        lambda: stepwise(modelscope.model),
        lambda: one_by_one(modelscope.model),
        lambda: graph_offload(modelscope.model.parts().values(), HOST, smallest=0),
        lambda: idle_offload(modelscope.model, reward.networks(), DEVICE, HOST),
        lambda: block_swap(modelscope.model, DEVICE, HOST),
    ]
    order = torch.randperm(len(each), generator=torch.Generator().manual_seed(seed)).tolist()
    with ExitStack() as stack:
        for i in order:
            stack.enter_context(each[i]())
        found = modelscope.step(stack, reward)
    assert_same(found, modelscope.undropped, ROUNDING)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("stop_input", [True, False])
def test_stepwise_equals_plain_autograd(case: Case, k: int, stop_input: bool) -> None:
    wanted = case.gradients(k=k, stop_input=stop_input)
    assert_same(case.gradients(MemoryConfig(stepwise=True), k=k, stop_input=stop_input), wanted, 0)


def test_weights_stay_wherever_they_were_moved_to_and_their_former_places_do_not() -> None:
    layer, shelf = nn.Linear(4, 4, bias=False), _Shelf(HOST, 0)
    first = layer.weight.data
    shelf.leave(layer, ())
    layer.weight.data = first.clone()
    assert shelf.put(first) is first  # alive
    assert isinstance(shelf.put(layer.weight.detach()), tuple)  # not yet seen there
    shelf.leave(layer, ())
    kept = layer.weight.detach()
    assert shelf.put(kept) is kept
    del first
    gc.collect()
    assert list(shelf.weights) == [kept.untyped_storage()._cdata]


def test_offloading_the_graph_copies_no_weight_of_a_moved_network(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, real = list[Tensor](), _Shelf._store

    def store(shelf: _Shelf, tensor: Tensor) -> Any:
        stored.append(tensor)
        return real(shelf, tensor)

    monkeypatch.setattr(_Shelf, "_store", store)
    network = nn.Sequential(nn.Linear(4, 8), nn.MultiheadAttention(8, 2)).requires_grad_(False)
    with graph_offload([network], HOST, smallest=0):
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()
        x = network[0](torch.ones(3, 4, requires_grad=True))
        network[1](x, x, x)[0].sum().backward()
    addresses = {parameter.data_ptr() for parameter in network.parameters()}
    assert stored
    assert not [tensor for tensor in stored if tensor.data_ptr() in addresses]
    assert not any(module._forward_pre_hooks for module in network.modules())


# --- decoding in parts -----------------------------------------------------------------------


def test_slices_differentiate_the_statistics_of_the_whole_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows in slices of two; the temporal block's two normalizations see all of them."""
    monkeypatch.setattr(sliced_decode, "ROWS", 2)
    torch.manual_seed(0)
    block = TemporalResnetBlock(in_channels=64, out_channels=64, temb_channels=None, eps=1e-5).double()
    block.requires_grad_(False)
    for parameter in block.parameters():
        parameter.copy_(torch.randn_like(parameter))
    model: Any = SimpleNamespace(parts=lambda: {"vae": block})
    x = torch.randn(2, 64, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)

    def run() -> tuple[Tensor, Tensor]:
        found = block(x, None) * weight
        return found, torch.autograd.grad(found.square().sum(), x)[0]

    plain = run()
    with sliced_decode.sliced_decode(model):
        sliced = run()
    for ours, theirs in zip(sliced, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.detach().abs().max()))


class Stretched:
    """A model whose decoder repeats each latent; pixels depend on nothing else."""

    def parts(self) -> dict[str, nn.Module]:
        return {"vae": nn.Identity()}

    def decode(self, z: Tensor, indices: Sequence[int]) -> Tensor:
        return z[:, :, list(indices)].transpose(1, 2).repeat_interleave(4, -1).repeat_interleave(4, -2).sin()


@pytest.mark.parametrize(("rows", "columns", "tile"), [(9, 7, 4), (12, 12, 6), (5, 16, 8), (7, 7, 1)])
def test_tiles_share_every_pixel_once(rows: int, columns: int, tile: int) -> None:
    model: Any = Stretched()
    z = torch.randn(2, 3, 4, rows, columns, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 3, 4 * rows, 4 * columns, dtype=torch.float64)

    def run() -> tuple[Tensor, Tensor]:
        video = model.decode(z, [0, 3])
        return video, torch.autograd.grad((video * weight).sum(), z)[0]

    plain = run()
    with tiled_decode(model, tile):
        tiled = run()
    assert torch.equal(tiled[0], plain[0])
    torch.testing.assert_close(tiled[1], plain[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("tile", "least"), [(5, 0.98), (3, 0.85)])
@pytest.mark.parametrize("name", ["wan", "wan_i2v"])
def test_gradients_in_tiles_point_nearly_where_those_at_once_do(
    tmp_path: Path, name: str, tile: int, least: float
) -> None:
    """The cosine between LoRA gradients, on random weights and 4 by 6 latents: as little as a tile can see."""
    with made(name, tmp_path) as case:
        found = case.gradients(MemoryConfig(decode_tile=8 * tile), dropout=0.0)
        ours, theirs = (torch.cat([g.flatten() for g in part]) for part in (found, case.undropped))
        cosine = nn.functional.cosine_similarity(ours, theirs, dim=0)
        assert least < cosine < 1


def test_a_decoder_that_normalizes_over_the_picture_is_not_tiled(modelscope: Case) -> None:
    assert_same(modelscope.gradients(MemoryConfig(decode_tile=4)), modelscope.plain, 0)


# --- storage in few bits ---------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
def test_low_bit_storage_is_a_model_that_was_rounded_once(case: Case, storage: str) -> None:
    found = case.gradients(MemoryConfig(weight_storage=storage), *EXACT.values())
    exact = {}
    for module, name, tensor in (found for block in case.model.blocks for found in frozen_weights(block)):
        if tensor.ndim > 1:
            pack = STORAGES[storage](tensor)
            exact[module, name] = tensor
            module._parameters[name] = nn.Parameter(pack.unpack(pack.data, pack.scale), requires_grad=False)
    try:
        rounded = case.gradients()
    finally:
        for (module, name), tensor in exact.items():
            module._parameters[name] = tensor
    assert_same(found, rounded, 0)
    assert any(not torch.equal(a, b) for a, b in zip(found, case.plain, strict=True))


@pytest.mark.parametrize(("storage", "error", "share"), [("float8", 0.04, 0.27), ("nf4", 0.12, 0.15)])
def test_low_bit_storage_is_near_and_small(storage: str, error: float, share: float) -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    pack = STORAGES[storage](weight)
    unpacked = pack.unpack(pack.data, pack.scale)
    assert (unpacked - weight).norm() < error * weight.norm()
    assert pack.data.nbytes + pack.scale.nbytes < share * weight.nbytes
    assert torch.equal(STORAGES[storage](unpacked).unpack(pack.data, pack.scale), unpacked)


@pytest.mark.parametrize("size", [2e-2, 2e-4, 2e-5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_bit_storage_is_as_near_in_half_precision_and_for_small_weights(dtype: torch.dtype, size: float) -> None:
    weight = (torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * size).to(dtype)
    for storage, error in (("float8", 0.03), ("nf4", 0.1)):
        pack = STORAGES[storage](weight)
        unpacked = pack.unpack(pack.data, pack.scale)
        assert unpacked.dtype == dtype
        assert (unpacked.float() - weight.float()).norm() < error * weight.float().norm(), storage


def test_unpacking_copies_nothing_to_the_device_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = STORAGES["nf4"](torch.randn(4, 64))
    wanted = pack.unpack(pack.data, pack.scale)
    monkeypatch.setattr(packing, "quantiles", None)
    assert torch.equal(pack.unpack(pack.data, pack.scale), wanted)


# --- undone ----------------------------------------------------------------------------------


def test_everything_is_undone_on_exit(case: Case) -> None:
    def state() -> list[object]:
        modules = [case.model.denoiser, *case.model.denoiser.modules(), case.model.parts()["vae"]]
        return [list(vars(case.model)), *(list(vars(m)) for m in modules), *(list(m._buffers) for m in modules)]

    before, weights = state(), [*case.model.denoiser.parameters()]
    config = replace(PRESETS["12 GB"], resident_gb=1e-6, weight_storage="nf4", decode_tile=8)
    with pytest.raises(RuntimeError, match="inside"), tricks(case.model, (), config, DEVICE, HOST):
        raise RuntimeError("inside")
    assert before == state()
    assert all(a is b for a, b in zip(weights, case.model.denoiser.parameters(), strict=True))
    assert_same(case.gradients(), case.plain, 0)


def test_a_trick_is_not_put_on_twice(modelscope: Case) -> None:
    with stepwise(modelscope.model), pytest.raises(ValueError, match="RECOMPUTE"), stepwise(modelscope.model):
        pass
    with low_bit(modelscope.model, "nf4"), pytest.raises(ValueError, match="UNPACK"), low_bit(modelscope.model, "nf4"):
        pass
