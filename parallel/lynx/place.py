"""Where a layer's work is done: model, layout and cluster in one value, with the sizes that all its parts need."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .cluster import Cluster, outermost
from .cost import Roofline
from .layout import Layout
from .problem import Window
from .shape import ModelShape
from .steps import Exchange, Step
from .traffic import all_reduce_seconds, reduce_scatter_seconds


@dataclass(frozen=True, kw_only=True)
class Place:
    """T tokens of a micro-batch, `local` of them where the sequence is cut; bytes of a number as the layout has it."""

    shape: ModelShape
    layout: Layout
    cluster: Cluster

    @cached_property
    def time(self) -> Roofline:
        return Roofline(self.cluster, self.layout.compute)

    @property
    def T(self) -> int:
        return self.layout.tokens

    @property
    def local(self) -> int:
        return self.layout.local_tokens

    @property
    def width(self) -> int:
        return self.layout.compute_bytes

    def linear(
        self,
        name: str,
        source: str,
        tokens: int,
        columns: int,
        rows: int,
        *,
        reads: str = "",
        again: Window | None = None,
    ) -> Step:
        """`tokens` tokens of `columns` numbers times a weight [columns, rows].

        reads: the step whose output the gradient of the weight needs, where that is not `source`.
        """
        seconds = self.time.matmul(tokens, rows, columns, self.width)
        return Step(
            name=name,
            seconds=seconds,
            bytes=tokens * rows * self.width,
            inputs=(source,),
            reads=(reads or source,),
            backward=self.time.matmul(tokens, columns, rows, self.width),
            weights=self.time.matmul(columns, rows, tokens, self.width),
            again=again,
            flops=2 * tokens * columns * rows,
            gradient_bytes=self.formed(columns * rows),
        )

    def formed(self, numel: int) -> int:
        """Bytes of the gradient of a weight of `numel` numbers before it is added: cast, and as it is computed."""
        if not self.layout.eager:
            return 0
        return numel * (self.layout.weight_bytes + (self.width if self.width < self.layout.weight_bytes else 0))

    def norm(self, name: str, source: str, tokens: int, columns: int, source_width: int) -> Step:
        """A norm over numbers of `source_width` bytes; statistics, some bytes a token, are left out."""
        size, read = tokens * columns * self.width, tokens * columns * source_width
        return Step(
            name=name,
            seconds=self.time.memory(size + read),
            bytes=size,
            inputs=(source,),
            reads=(source,),
            backward=self.time.memory(size + 2 * read),
        )

    def residual(self, name: str, stream: str, branch: str, mask: str) -> Step:
        """The residual stream plus a branch, dropped out by `mask` where there is one."""
        numbers = self.local * self.shape.d_model
        size = numbers * self.layout.residual_bytes
        moved = 2 * size + numbers * (self.width + bool(mask))
        dropping = (mask,) if mask else ()
        return Step(
            name=name,
            seconds=self.time.memory(moved),
            bytes=size,
            inputs=(stream, branch, *dropping),
            reads=dropping,
            # Without dropout the gradient is passed on as it is; summing it with the norm's is the norm's.
            backward=self.time.memory(2 * numbers * self.width + numbers) if mask else 0.0,
        )

    def mask(self, name: str, numbers: int) -> Step:
        """A dropout mask, a byte for each number."""
        return Step(name=name, seconds=self.time.memory(numbers), bytes=numbers)

    @property
    def _rho(self) -> float:
        return outermost(self.cluster, self.layout.tensor_group).slowdown

    def enter(self, name: str, source: str) -> tuple[Exchange, Window | None]:
        """Tokens from where the sequence is cut to where heads or hidden units are, and what repeats it backward."""
        t = self.layout.tensor_group
        size = self.T * self.shape.d_model * self.width
        if t.size == 1:
            return Exchange(name=f"{name} gather", inputs=(source,)), None
        if not self.layout.sequence_parallel:
            summed = all_reduce_seconds(self.cluster, t, size)
            return Exchange(name=f"{name} copy", backward=summed, inputs=(source,), speed=self._rho), None
        seconds = reduce_scatter_seconds(self.cluster, t, size)
        exchange = Exchange(
            name=f"{name} gather", forward=seconds, backward=seconds, bytes=size, inputs=(source,), speed=self._rho
        )
        return exchange, Window(name=f"{name} gather again", seconds=seconds, speed=self._rho)

    def leave(self, name: str, source: str) -> Exchange:
        """Partial sums back to where the sequence is cut, or whole to all ranks."""
        t = self.layout.tensor_group
        size = self.T * self.shape.d_model * self.width
        if t.size == 1:
            return Exchange(name=f"{name} sum", inputs=(source,))
        if not self.layout.sequence_parallel:
            summed = all_reduce_seconds(self.cluster, t, size)
            return Exchange(name=f"{name} all-reduce", forward=summed, bytes=size, inputs=(source,), speed=self._rho)
        seconds = reduce_scatter_seconds(self.cluster, t, size)
        return Exchange(
            name=f"{name} reduce-scatter",
            forward=seconds,
            backward=seconds,
            bytes=size // t.size,
            inputs=(source,),
            speed=self._rho,
        )
