"""Layer-wise distillation: a block's weights are trained so that, quantized, it gives what it gave.

ZeroQuant (Yao et al., arXiv:2206.01861), section 4.3: one block after the other learns from its
own original, on the inputs that the quantized blocks before it make; no labels, no whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from zqfp_convert.calibration.stages import Calls
from zqfp_convert.compare.activations import ActivationQuantizer
from zqfp_convert.compare.placement import Placement
from zqfp_convert.model.blocks import bias_of, get_linear, put

PASSES = 8  # over the calibration batches
RATE = 0.03  # Adam's, in steps of the grid; it falls linearly to nothing


class _Learner(nn.Module):
    """A quantized linear whose weight can be trained; rounding passes gradients straight on."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        quantizer: ActivationQuantizer,
        place: Callable[[Tensor], Placement],
    ) -> None:
        """`weight` float32 `[N, K]`, for inputs that the quantizer has divided."""
        super().__init__()
        self.start, self.bias, self._quantizer, self._place = weight, bias, quantizer, place
        placed = place(weight)
        steps = 2 ** (placed.format.bits - 1)
        columns = torch.arange(weight.shape[1], device=weight.device)
        self.step = placed.marks(columns) * (placed.format.largest / steps)
        self.moved = nn.Parameter(torch.zeros_like(weight))

    def latent(self) -> Tensor:
        """The weight before it is rounded, float32 `[N, K]`."""
        latent: Tensor = self.start + self.moved * self.step
        return latent

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        latent = self.latent()
        rounded = self._place(latent.detach()).quantize(latent.detach())
        weight = latent + (rounded - latent).detach()
        divided = x if self._quantizer.divisor is None else x / self._quantizer.divisor
        seen = divided + (self._quantizer(x) - divided).detach()
        return nn.functional.linear(seen.to(x.dtype), weight.to(x.dtype), self.bias)


def distill(
    block: nn.Module,
    weights: dict[str, Tensor],
    quantizers: dict[str, ActivationQuantizer],
    place: Callable[[Tensor], Placement],
    calls: Calls,
    hidden: list[Tensor],
) -> dict[str, Tensor]:
    """Train the weights of a block for being rounded; the block itself stays as it is.

    The loss is the mean squared error of the block's output, over that output's mean square.

    Args:
        block: the original.
        weights: float32 `[N, K]` of its linears by name, for inputs that quantizers have divided.
        quantizers: of the linears' inputs, by the same names.
        place: puts the grid under a weight.
        calls: with which arguments the block is called, by batch.
        hidden: what enters it, `[batch, tokens, width]` for each calibration batch.

    Returns:
        The trained weights, not rounded yet, float32 `[N, K]` by name.
    """
    device = next(block.parameters()).device
    wanted = [calls(i).run(block, batch.to(device)).cpu() for i, batch in enumerate(hidden)]
    student = copy.deepcopy(block)
    learners = {}
    with torch.enable_grad():
        for name, weight in weights.items():
            bias = bias_of(get_linear(block, name))
            learners[name] = _Learner(weight, bias, quantizers[name], place)
            put(student, name, learners[name])
        moved = [learner.moved for learner in learners.values()]
        optimizer = torch.optim.Adam(moved, lr=RATE)
        total = PASSES * len(hidden)
        for step in range(total):
            index = step % len(hidden)
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / total)
            goal = wanted[index].to(device).float()
            have = calls(index).run(student, hidden[index].to(device)).float()
            loss = (have - goal).square().mean() / goal.square().mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return {name: learner.latent().detach() for name, learner in learners.items()}
