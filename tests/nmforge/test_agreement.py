"""A run beside the integer reference, the cycle engine and the float network."""

import pytest
import torch
from torch import nn

import nmforge as nf
from nmforge.agreement import NOISE, float_agreement, rtl_agreement
from nmforge.zoo import measure_network


class Two(nn.Module):
    """One stable result, and one that is what little is left of two nearly equal numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.load_state_dict({name: x * 1.001 for name, x in self.first.state_dict().items()})

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first(x), self.second(x) - self.first(x)


def test_noise_tells_a_network_that_makes_much_of_little() -> None:
    x, network = torch.randn(8, 32), Two()
    with torch.no_grad():
        exact = network(x)
    assert float_agreement(network, x, exact)["cosine"] == pytest.approx(1)
    assert float_agreement(network, x, exact)["cosine_noisy"] < 0.9
    alone = float_agreement(network.first, (x,), [exact[0]])["cosine_noisy"]
    assert alone == pytest.approx(1 / (1 + NOISE**2) ** 0.5, abs=2e-5)
    assert float_agreement(network, {"x": x}, (exact[0], -exact[1]))["cosine"] == pytest.approx(-1)
    assert not network.first._forward_hooks
    gate = nn.Linear(32, 1)  # a single value has no spread
    with torch.no_grad():
        assert float_agreement(gate, x[:1], [gate(x[:1])])["cosine_noisy"] == pytest.approx(1)


def test_results_that_are_none_are_left_out() -> None:
    class Perhaps(Two):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
            return self.first(x), None

    x, network = torch.randn(8, 32), Perhaps()
    with torch.no_grad():
        assert float_agreement(network, x, network(x)[:1])["cosine"] == pytest.approx(1)


def test_the_encoder_of_torch_is_disturbed_too() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    network, x = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval(), torch.randn(1, 8, 16)
    with torch.no_grad():
        found = float_agreement(network, x, [network(x)])
    assert found["cosine"] == pytest.approx(1, abs=1e-6) and 0.99 < found["cosine_noisy"] < 1 - 1e-6
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_run_of_the_rtl_agrees() -> None:
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8)).eval(), torch.randn(8, 24)
    found = measure_network(network, x, "tiny", rtl=True, order="operator")
    assert found["bit_exact"] and found["counters_equal"] and found["results_equal"] and found["bytes_checked"] > 0
    assert found["cosine"] > 0.99
    program = nf.compile(network, x, arch="tiny", calibration=[x], order="operator")
    other = nf.compile(nn.Linear(24, 8), x, arch="tiny", calibration=[x])
    wrong = rtl_agreement(network, program, x, nf.simulate(other, engine="cycle"))
    assert wrong["counters_equal"] is False and wrong["bit_exact"]
