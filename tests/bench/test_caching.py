"""The caching baseline: calls as many as asked for, and exact where its assumption holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.bench.caching import STEPS, choices, skipping


class Line(nn.Module):
    """An output linear in time."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, timestep):
        self.calls += 1
        return (2 - 0.5 * timestep.view(-1, 1) + 0 * x,)


@pytest.mark.parametrize("calls", [1, 2, 5, 10])
def test_so_many_even_steps_call_the_network(calls):
    for called in choices(calls):
        assert len(called) == calls and min(called) == 0 and max(called) < STEPS
        gaps = torch.tensor(sorted(called)).diff()
        assert calls == 1 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("linear", [False, True])
def test_skipped_steps_reuse_or_extrapolate(linear):
    network, x, called = Line(), torch.zeros(2, 1), {0, 10, 40}
    times = torch.linspace(1000, 0, STEPS)
    with skipping([network], called, linear):
        for _ in range(2):  # a new run begins anew
            outputs = [network(x, timestep=t.expand(2))[0] for t in times]
    assert network.calls == 2 * len(called) and "forward" not in vars(network)
    last = [max(k for k in called if k <= i) for i in range(STEPS)]
    exact = [i if linear and i >= 10 else last[i] for i in range(STEPS)]  # a line needs two outputs
    wanted = torch.stack([network(x, timestep=times[i].expand(2))[0] for i in exact])
    torch.testing.assert_close(torch.stack(outputs), wanted, rtol=0, atol=1e-4)
