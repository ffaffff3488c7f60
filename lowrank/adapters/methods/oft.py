"""OFT: orthogonal fine-tuning (arXiv 2306.07280)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from lowrank.adapters.base import Adapter, shape
from lowrank.adapters.methods.update import Recomputed, compute_dtype


class OFT(Adapter):
    """h = W Rᵀ x + b with R orthogonal and block-diagonal: the angles between W's neurons stay what they are.

    Each block is R = (I − Q)(I + Q)⁻¹, Cayley's form, of a skew-symmetric Q (section 3.3), whose entries above the
    diagonal, row by row, are what trains; Q is zero at the start. The input is turned instead of the weight, x R of
    a row x, so that a quantised base stays as it is. ``block_size`` divides every site's in.

    With ``neumann`` = n, R is I + 2Q + 2Q² + … + 2Qⁿ⁻² + Qⁿ⁻¹ instead, the beginning of the series of
    (I + Q)(I − Q)⁻¹: cheaper where blocks are large, orthogonal only while Q is small. PEFT's default is 5.

    Raises ValueError where block_size is no divisor of in above 1, or neumann is neither 0 nor 4 to 1000.
    """

    def __init__(self, base: nn.Module, *, generator: torch.Generator, block_size: int = 16, neumann: int = 0) -> None:
        super().__init__()
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 2:
            raise ValueError(f"block_size: {block_size!r} is not allowed; an integer, 2 or more.")
        if isinstance(neumann, bool) or not isinstance(neumann, int) or (neumann and not 4 <= neumann <= 1000):
            raise ValueError(f"neumann: {neumann!r} is not allowed; 0 (exact), or a number of terms, 4 to 1000.")
        width = shape(base)[1]
        if width % block_size:
            sizes = [n for n in range(2, width + 1) if width % n == 0]
            near = min(sizes, key=lambda n: abs(n - block_size), default=width)
            wanted = f"a divisor of that, such as {near}"
            raise ValueError(f"block_size: {block_size} is not allowed on a site of {width} inputs; {wanted}.")
        self.block_size, self.neumann = block_size, neumann
        self.R = nn.Parameter(torch.zeros(width // block_size, block_size * (block_size - 1) // 2))

    def rotation(self) -> Tensor:
        """R, (blocks, size, size), in fp32 or wider: there is no solver in bf16."""
        entries = self.R.to(torch.promote_types(self.R.dtype, torch.float32))
        above = torch.triu_indices(self.block_size, self.block_size, 1, device=entries.device)
        Q = entries.new_zeros(len(entries), self.block_size, self.block_size)
        Q[:, above[0], above[1]] = entries
        Q = Q - Q.mT
        one = torch.eye(self.block_size, dtype=Q.dtype, device=Q.device)
        with torch.autocast(Q.device.type, enabled=False):
            if not self.neumann:
                return torch.linalg.solve(one + Q, one - Q, left=False)
            R, power = one, Q
            for _ in range(self.neumann - 2):
                R, power = R + 2 * power, power @ Q
            return R + power

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        return base(Recomputed.apply(partial(turned, compute_dtype(x)), x, self.rotation()))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows = weight.unflatten(-1, (-1, self.block_size))  # (out, blocks, size)
        return torch.einsum("obj,bij->obi", rows, self.rotation().to(weight.dtype)).flatten(1), bias

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}"


def turned(dtype: torch.dtype, x: Tensor, R: Tensor) -> Tensor:
    """x R, block by block, computed in ``dtype`` and given in x's own: x (…, in), R (blocks, size, size)."""
    rows = x.to(dtype).unflatten(-1, R.shape[:2])  # (…, blocks, size)
    return torch.einsum("...bi,bij->...bj", rows, R.to(dtype)).flatten(-2).to(x.dtype)
