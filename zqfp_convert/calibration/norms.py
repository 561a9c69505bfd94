"""RMSNorms of a block in one kernel each, where that gives what the block's own give.

Plain ones take six passes over a GPU's memory. What a norm computes is not read off its
name: every form is tried out on the block's own activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zqfp_convert.calibration.stream import Call
from zqfp_convert.numerics import kernels

if TYPE_CHECKING:
    from zqfp_convert.numerics.kernels.norm import Form

FORMS: tuple[Form, ...] = ("twice", "once", "once, one more")
DIFFER = 0.01  # of the elements may: sums are made in another order
DTYPES = (torch.bfloat16, torch.float16)
EPSILONS = ("variance_epsilon", "eps", "epsilon")


class FusedNorm(nn.Module):
    """An RMSNorm of activations `[..., K]`."""

    def __init__(self, weight: nn.Parameter, epsilon: float, form: Form) -> None:
        """`weight` is `[K]`."""
        super().__init__()
        self.weight, self._epsilon, self._form = weight, epsilon, form

    def forward(self, x: Tensor) -> Tensor:
        """The norm of each token; the dtype is kept."""
        from zqfp_convert.numerics.kernels.norm import rms_norm

        return rms_norm(x, self.weight, self._epsilon, self._form)


def find_forms(block: nn.Module, call: Call, hidden: Tensor) -> dict[str, Form | None]:
    """What each class of norms in a block computes, None for another thing than the kernel does.

    Args:
        hidden: a batch of the block's hidden states.
    """
    norms = _norms(block)
    if not norms or hidden.dtype not in DTYPES or not kernels.take(hidden):
        return dict.fromkeys(kinds(block))
    found: dict[str, set[Form | None]] = {kind: set() for kind in kinds(block)}

    def compare(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
    ) -> None:
        plain = len(args) == 1 and not kwargs and isinstance(output, torch.Tensor)
        form = _form(module, args[0], output) if plain else None  # type: ignore[arg-type]
        found[_kind(module)].add(form)

    handles = [module.register_forward_hook(compare, with_kwargs=True) for module in norms.values()]
    try:
        call.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return {kind: forms.pop() if len(forms) == 1 else None for kind, forms in found.items()}


def kinds(block: nn.Module) -> set[str]:
    """The classes of a block's norms."""
    return {_kind(module) for module in _norms(block).values()}


def fuse_norms(block: nn.Module, forms: Mapping[str, Form | None]) -> None:
    """Put fused norms into a block, in the places of those whose form is known."""
    for name, norm in _norms(block).items():
        form, epsilon = forms[_kind(norm)], _epsilon(norm)
        if form is not None and epsilon is not None:
            block.set_submodule(name, FusedNorm(norm.get_parameter("weight"), epsilon, form))


def _norms(block: nn.Module) -> dict[str, nn.Module]:
    """Modules of a block that may be norms, by their names."""
    return {name: one for name, one in block.named_modules() if _may_be(one)}


def _kind(module: nn.Module) -> str:
    """Its class, and what it was made with."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))}
    given = ", ".join(f"{name}={plain[name]}" for name in sorted(plain) if name != "training")
    return f"{type(module).__module__}.{type(module).__qualname__}({given})"


def _may_be(module: nn.Module) -> bool:
    held = dict(module.named_parameters())
    return held.keys() == {"weight"} and held["weight"].dim() == 1 and _epsilon(module) is not None


def _epsilon(module: nn.Module) -> float | None:
    found = [getattr(module, name) for name in EPSILONS if hasattr(module, name)]
    return found[0] if found and isinstance(found[0], float) else None


def _form(module: nn.Module, given: Tensor, output: Tensor) -> Form | None:
    """The form that makes this of that, but for the last bits of few elements.

    What is rounded twice may be two units of the last place apart: a number that is rounded to the
    one beside it is times a weight of up to two.
    """
    from zqfp_convert.numerics.kernels.norm import WIDEST, rms_norm

    weight, epsilon = module.get_parameter("weight"), _epsilon(module)
    same = given.shape == output.shape and given.dtype == output.dtype and given.dtype in DTYPES
    if not same or given.shape[-1:] != weight.shape or len(weight) > WIDEST:
        return None
    assert epsilon is not None
    about = torch.finfo(output.dtype)
    near = output.float().abs().clamp_min(about.tiny).mul_(2 * about.eps)
    for form in FORMS:
        apart = (rms_norm(given, weight, epsilon, form).float() - output.float()).abs()
        close = bool((apart <= near).all())
        if close and float((apart > 0).float().mean()) <= DIFFER:
            return form
    return None
