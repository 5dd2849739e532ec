"""Fused kernels of float32 and bfloat16, and trainers of other libraries, against the same in float64 or by hand."""

import copy

import pytest
import torch
from definitions import layerwise
from entries import seeded
from library_networks import library
from torch import Tensor, nn
from torch.nn import functional as F

import falign

pytestmark = [pytest.mark.unchecked, pytest.mark.filterwarnings("ignore")]
RULES = ("fa", "usf")


@pytest.fixture(autouse=True)
def _single():
    torch.set_default_dtype(torch.float32)


class Tagger(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(16, 3)
        if kind == "attention":
            self.middle = nn.MultiheadAttention(8, 2, batch_first=True)
            self.last = nn.Linear(8, 3)
        else:
            self.middle = getattr(nn, kind)(8, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.attends = kind == "attention"

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        y, _ = self.middle(h, h, h, need_weights=False) if self.attends else self.middle(h)
        return self.last(y)


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().mean()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "attention"])
def test_kernels_of_float32(kind, rule):
    """torch's own kernels for LSTM and attention in float32 are others than those of float64."""
    with seeded(1):
        plain, x = Tagger(kind), torch.randn(3, 4, 5)
    net = falign.convert(copy.deepcopy(plain), rule, seed=2, example=x)
    loss_of(net, x).backward()
    feedback = {name: matrix.double() for name, matrix in falign.feedback_state(net).items()}
    wide = copy.deepcopy(plain).double()
    for name in feedback if rule == "usf" else ():
        weight = dict(wide.named_parameters()).get(name)
        weight = wide.get_submodule(name).weight if weight is None else weight
        feedback[name] = feedback[name] * weight.detach().sign()
    expected, _, _ = layerwise(wide, lambda net: loss_of(net, x.double()), feedback)
    for name, parameter in net.named_parameters():
        should = expected[name]
        assert float((parameter.grad - should).norm()) <= 2e-6 * max(float(should.norm()), 1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_of_routed_experts(dtype):
    """Mixtral's experts as one kernel: no weight carries the error, and the gradients are those of single products."""
    transformers = library("transformers")
    if transformers is None:
        pytest.skip("transformers is not installed")
    gradients = {}
    for how in ("grouped_mm", "eager"):
        settings = transformers.MixtralConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
            vocab_size=19, num_local_experts=3, use_cache=False,
        )  # fmt: skip
        settings._experts_implementation = how
        with seeded(1):
            net = transformers.MixtralForCausalLM(settings).to(dtype)
            for parameter in net.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
            x = torch.randint(19, (2, 8))
        falign.convert(net, "fa", seed=2, example=x)
        assert falign.transport(net, x, lambda result: result.logits.float().square().mean()) == {}
        net(x).logits.float().square().mean().backward()
        gradients[how] = {name: p.grad.float() for name, p in net.named_parameters()}
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    for name, single in gradients["eager"].items():
        assert float((gradients["grouped_mm"][name] - single).norm()) <= tolerance * float(single.norm()), name


def trained_by_hand(rule: str, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    net = converted(rule, batches[0][0])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(x).mean(1), y).backward()
        optimizer.step()
    return net


def converted(rule: str, x: Tensor) -> nn.Module:
    with seeded(1):
        net = Tagger("GRU")
    return falign.convert(net, rule, seed=2, example=x)


def batches() -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(3)
    return [(torch.randn(6, 4, 5, generator=random), torch.randint(3, (6,), generator=random)) for _ in range(5)]


def same(one: nn.Module, other: nn.Module) -> None:
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fa", "kp", "adafa", "dfa"])
def test_lightning_trains_to_the_bit(rule, tmp_path):
    lightning = library("lightning.pytorch")
    if lightning is None:
        pytest.skip("lightning is not installed")
    data = batches()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = converted(rule, data[0][0])

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.net(x).mean(1), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    same(module.net, trained_by_hand(rule, data))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fa", "kp", "adafa", "dfa"])
def test_accelerate_trains_to_the_bit(rule):
    accelerate = library("accelerate")
    if accelerate is None:
        pytest.skip("accelerate is not installed")
    data = batches()
    accelerator = accelerate.Accelerator(cpu=True)
    net = converted(rule, data[0][0])
    net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    for x, y in data:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(net(x).mean(1), y))
        optimizer.step()
    same(accelerator.unwrap_model(net), trained_by_hand(rule, data))
