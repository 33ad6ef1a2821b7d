r"""Convolution layers that are fast on CPU too.

XLA's convolutions are slow on CPU, above all inside ``lax.scan``, where its matrix products are
not. `Conv` and `ConvTranspose` are flax's layers of the same names, with the same parameters and
the same results; on CPU they compute them as matrix products, elsewhere as XLA's convolution. The
choice is made when the program is lowered, by `jax.lax.platform_dependent`.

Either layer relates a fine grid to a coarse one, a kernel tap :math:`t` of the coarse point
:math:`p` lying on the fine point :math:`s p + o_t`, with stride :math:`s` and offset :math:`o_t`:

.. math::
    \text{columns:} \quad c_{p t} = x_{s p + o_t}, \qquad
    \text{overlay:} \quad y_b = \sum_{p, t \,:\, s p + o_t = b} z_{p t}.

A strided convolution multiplies the columns of its input by the kernel; a transposed one
overlays the products of its input with the kernel. Columns and overlay are each other's
transpose, so the gradient of one kind of layer is made of what computes the other, and all that
takes time, forward and backward, is a matrix product.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import canonicalize_padding
from jax import Array, lax

__all__ = ["Conv", "ConvTranspose"]

# Each tap is a slice to trace and compile, and a copy of the array: beyond, XLA's own is used.
_MAX_TAPS = 128

_Pairs = Sequence[tuple[int, int]]


class Conv(nnx.Conv):
    """A convolution, `flax.nnx.Conv` computed by matrix products on CPU.

    It takes the arguments of `flax.nnx.Conv`, has its parameters and returns its results, up to
    rounding. Groups of features, and input dilation together with strides, are left to XLA's
    convolution on every platform.

    The gradient is a custom rule on CPU: reverse mode, and forward over reverse as in
    `jax.hessian`, but not `jax.jvp` or `jax.jacfwd` of the layer itself. Where those are needed,
    pass ``conv_general_dilated=jax.lax.conv_general_dilated``.

    Args:
        *args: as for `flax.nnx.Conv`: ``in_features``, ``out_features``, ``kernel_size``,
            ``strides``.
        **kwargs: as for `flax.nnx.Conv`.

    Example:
        >>> layer = Conv(1, 32, (3, 3), strides=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((5, 28, 28, 1))).shape
        (5, 14, 14, 32)
    """

    @functools.wraps(nnx.Conv.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("conv_general_dilated", _convolve)
        super().__init__(*args, **kwargs)


class ConvTranspose(nnx.ConvTranspose):
    """A transposed convolution, `flax.nnx.ConvTranspose` computed by matrix products on CPU.

    It takes the arguments of `flax.nnx.ConvTranspose`, has its parameters and returns its
    results, up to rounding. Circular padding and masks are left to XLA's convolution on every
    platform. Gradients are as for `Conv`.

    Args:
        *args: as for `flax.nnx.ConvTranspose`: ``in_features``, ``out_features``,
            ``kernel_size``, ``strides``.
        **kwargs: as for `flax.nnx.ConvTranspose`.

    Example:
        >>> layer = ConvTranspose(32, 1, (3, 3), strides=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((5, 14, 14, 32))).shape
        (5, 28, 28, 1)
    """

    def __call__(self, inputs: Array) -> Array:
        """Apply the layer to ``(*batch, *spatial, in_features)``, with any batch axes or none."""
        rank = len(self.kernel_size)
        padding = canonicalize_padding(self.padding, rank)
        known = not isinstance(padding, str) or padding in ("SAME", "VALID")
        if self.mask is not None or not known:
            return super().__call__(inputs)
        strides = _per_axis(self.strides, rank)
        dilation = _per_axis(self.kernel_dilation, rank)
        if isinstance(padding, str):
            padding = _transposed_padding(padding, self.kernel_size, strides, dilation)
        bias = self.bias[...] if self.bias is not None else None
        inputs, kernel, bias = self.promote_dtype(
            (inputs, self.kernel[...], bias), dtype=self.dtype
        )
        if self.transpose_kernel:
            kernel = jnp.flip(kernel, range(rank)).swapaxes(-1, -2)
        batch_shape = inputs.shape[: inputs.ndim - rank - 1]
        outputs = _convolve(
            inputs.reshape(math.prod(batch_shape), *inputs.shape[len(batch_shape) :]),
            kernel,
            (1,) * rank,
            padding,
            lhs_dilation=strides,
            rhs_dilation=dilation,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        outputs = outputs if bias is None else outputs + bias
        return outputs.reshape(*batch_shape, *outputs.shape[1:])


def _per_axis(value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Spell out a setting that may be given once for all spatial axes."""
    if value is None or isinstance(value, int):
        return (value or 1,) * rank
    return tuple(value)


def _transposed_padding(
    padding: str, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """What `jax.lax.conv_transpose` pads its input with, once the strides have dilated it."""
    pairs = []
    for size, stride, gap in zip(kernel, strides, dilation, strict=True):
        extent = (size - 1) * gap + 1
        if padding == "VALID":
            total, low = extent + stride - 2 + max(extent - stride, 0), extent - 1
        else:
            total = extent + stride - 2
            low = extent - 1 if stride > extent - 1 else -(-total // 2)
        pairs.append((low, total - low))
    return pairs


@dataclasses.dataclass(frozen=True)
class _Axis:
    """How the two grids lie along a spatial axis, ``fine`` and ``coarse`` being their sizes."""

    fine: int
    coarse: int
    stride: int
    offsets: tuple[int, ...]

    @property
    def span(self) -> int:
        """How far one tap of all coarse points reaches on the fine grid."""
        return (self.coarse - 1) * self.stride + 1

    @property
    def fine_padding(self) -> tuple[int, int]:
        """Zeros around the fine grid, for every tap to lie on it."""
        return max(0, -min(self.offsets)), max(0, self.span + max(self.offsets) - self.fine)

    @property
    def phase_size(self) -> int:
        """The number of fine points with the same remainder modulo the stride, at most."""
        return -(-self.fine // self.stride)

    @property
    def phase_shifts(self) -> list[tuple[int, int]]:
        """For each tap its phase, and how far it shifts the coarse grid there."""
        return [(offset % self.stride, offset // self.stride) for offset in self.offsets]

    @property
    def coarse_padding(self) -> tuple[int, int]:
        """Zeros around the coarse grid, for its shifts to cover the phases."""
        shifts = [shift for _, shift in self.phase_shifts]
        return max(0, max(shifts)), max(0, self.phase_size - min(shifts) - self.coarse)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A convolution as matrix products; ``transposed`` if the output is on the fine grid."""

    axes: tuple[_Axis, ...]
    transposed: bool
    precision: Any
    dtype: Any


def _convolve(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | _Pairs,
    *,
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    **options: Any,
) -> Array:
    """Compute `jax.lax.conv_general_dilated`, channels last, by matrix products if on CPU."""
    axes = range(1, lhs.ndim - 1)
    last = lhs.ndim - 1
    images = (0, last, *axes)
    layout = lax.ConvDimensionNumbers(images, (last, last - 1, *range(last - 1)), images)
    by_xla = functools.partial(
        lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        **{"dimension_numbers": layout, **options},
    )
    plan = _make_plan(lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, options)
    if plan is None:
        return by_xla(lhs, rhs)
    by_products = functools.partial(_convolve_by_products, plan)
    return lax.platform_dependent(lhs, rhs, cpu=by_products, default=by_xla)


def _make_plan(
    lhs: Array,
    rhs: Array,
    strides: Sequence[int],
    padding: str | _Pairs,
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    options: dict[str, Any],
) -> _Plan | None:
    """Lay the grids out, or return None for what is left to XLA, errors included."""
    dilated = any(step > 1 for step in lhs_dilation)
    strided = any(step > 1 for step in strides)
    kernel = rhs.shape[:-2]
    if (
        options.get("feature_group_count", 1) != 1
        or options.get("out_sharding") is not None
        or (lhs.ndim, lhs.dtype, lhs.shape[-1]) != (rhs.ndim, rhs.dtype, rhs.shape[-2])
        or (dilated and (strided or isinstance(padding, str)))
        or math.prod(kernel) > _MAX_TAPS
        or 0 in (*lhs.shape, *rhs.shape)
    ):
        return None
    if isinstance(padding, str):
        windows = [(size - 1) * gap + 1 for size, gap in zip(kernel, rhs_dilation, strict=True)]
        padding = lax.padtype_to_pads(lhs.shape[1:-1], windows, strides, padding)
    # With neither stride nor dilation either form will do: the one with the fewer columns.
    transposed = dilated or (not strided and rhs.shape[-1] < rhs.shape[-2])
    settings = zip(
        lhs.shape[1:-1], kernel, strides, lhs_dilation, rhs_dilation, padding, strict=True
    )
    axes = tuple(_make_axis(*setting, transposed=transposed) for setting in settings)
    if any(min(axis.fine, axis.coarse) < 1 for axis in axes):
        return None
    dtype = jnp.dtype(options.get("preferred_element_type") or lhs.dtype)
    return _Plan(axes, transposed, options.get("precision"), dtype)


def _make_axis(
    size: int,
    taps: int,
    stride: int,
    dilation: int,
    gap: int,
    padding: tuple[int, int],
    *,
    transposed: bool,
) -> _Axis:
    low, high = padding
    extent = (size - 1) * dilation + 1 + low + high
    outputs = (extent - (taps - 1) * gap - 1) // stride + 1
    offsets = tuple(tap * gap - low for tap in range(taps))
    if transposed:
        return _Axis(outputs, size, dilation, tuple(-offset for offset in offsets))
    return _Axis(size, outputs, stride, offsets)


def _multiply(plan: _Plan, inputs: Array, kernel: Array) -> Array:
    """Convolve; the kernel is a matrix from columns, or to what is overlaid."""
    dot = functools.partial(jnp.tensordot, axes=1, precision=plan.precision)
    if plan.transposed:
        accumulator = _accumulator(plan.dtype)
        products = dot(inputs, _side_by_side(kernel), preferred_element_type=accumulator)
        return _overlay(products, plan.axes).astype(plan.dtype)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    return dot(_columns(inputs, plan.axes), matrix, preferred_element_type=plan.dtype)


def _forward(plan: _Plan, inputs: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _multiply(plan, inputs, kernel), (inputs, kernel)


def _backward(plan: _Plan, saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    """Transpose the products; the columns are made again, as they are large to keep."""
    inputs, kernel = saved
    dot = functools.partial(jnp.tensordot, precision=plan.precision)
    grid = list(range(inputs.ndim - 1))
    if plan.transposed:
        columns = _columns(cotangent, plan.axes)
        inputs_bar = dot(columns, _side_by_side(kernel).T, axes=1)
        kernel_bar = dot(inputs, columns, axes=(grid, grid))
        shape = (kernel.shape[-2], math.prod(kernel.shape[:-2]), kernel.shape[-1])
        kernel_bar = kernel_bar.reshape(shape).swapaxes(0, 1)
    else:
        matrix = kernel.reshape(-1, kernel.shape[-1]).T
        accumulator = _accumulator(cotangent.dtype)
        products = dot(cotangent, matrix, axes=1, preferred_element_type=accumulator)
        inputs_bar = _overlay(products, plan.axes)
        kernel_bar = dot(_columns(inputs, plan.axes), cotangent, axes=(grid, grid))
    kernel_bar = kernel_bar.reshape(kernel.shape)
    return inputs_bar.astype(inputs.dtype), kernel_bar.astype(kernel.dtype)


# What XLA's transposes of slices would take is several times the time of the products.
_convolve_by_products = jax.custom_vjp(_multiply, nondiff_argnums=(0,))
_convolve_by_products.defvjp(_forward, _backward)


def _accumulator(dtype: Any) -> Any:
    """The dtype in which to add products up, so that half precision rounds only once."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _side_by_side(kernel: Array) -> Array:
    """From ``(*taps, inputs, outputs)`` to the matrix ``(inputs, taps * outputs)``."""
    rows, outputs = kernel.shape[-2:]
    return kernel.reshape(-1, rows, outputs).swapaxes(0, 1).reshape(rows, -1)


def _columns(fine: Array, axes: tuple[_Axis, ...]) -> Array:
    """Put beside each other the fine points of a coarse one: ``(n, *coarse, taps * channels)``."""
    fine = _pad(fine, [axis.fine_padding for axis in axes])
    spans, strides = [axis.span for axis in axes], [axis.stride for axis in axes]
    starts = [[axis.fine_padding[0] + offset for offset in axis.offsets] for axis in axes]
    columns = [_window(fine, tap, spans, strides) for tap in itertools.product(*starts)]
    return columns[0] if len(columns) == 1 else lax.concatenate(columns, fine.ndim - 1)


def _overlay(columns: Array, axes: tuple[_Axis, ...]) -> Array:
    """Add up what the taps put on each fine point: the transpose of `_columns`.

    The fine points of one remainder modulo the stride are a phase. A tap touches one phase, as a
    shift of the coarse grid, so each phase is a sum of windows. At the end the phases interleave.
    """
    depth = columns.shape[-1] // math.prod(len(axis.offsets) for axis in axes)
    columns = _pad(columns, [axis.coarse_padding for axis in axes])
    sizes, ones = [axis.phase_size for axis in axes], (1,) * len(axes)
    phases: dict[tuple[int, ...], list[Array]] = {
        phase: [] for phase in itertools.product(*(range(axis.stride) for axis in axes))
    }
    taps = itertools.product(*(axis.phase_shifts for axis in axes))
    for number, tap in enumerate(taps):
        starts = [axis.coarse_padding[0] - s for axis, (_, s) in zip(axes, tap, strict=True)]
        window = _window(columns, starts, sizes, ones, (number * depth, depth))
        phases[tuple(phase for phase, _ in tap)].append(window)
    untouched = jnp.zeros((columns.shape[0], *sizes, depth), columns.dtype)
    sums = [sum(windows[1:], windows[0]) if windows else untouched for windows in phases.values()]
    return _window(_interleave(sums, axes), [0] * len(axes), [axis.fine for axis in axes], ones)


def _interleave(phases: list[Array], axes: tuple[_Axis, ...]) -> Array:
    """Merge the phases, which are in row-major order, from the last axis to the first."""
    for number, axis in reversed(list(enumerate(axes, start=1))):
        groups = [phases[i : i + axis.stride] for i in range(0, len(phases), axis.stride)]
        stacks = [jnp.stack(group, number + 1) for group in groups]
        phases = [
            stack.reshape(*stack.shape[:number], -1, *stack.shape[number + 2 :]) for stack in stacks
        ]
    return phases[0]


def _pad(array: Array, spatial: Sequence[tuple[int, int]]) -> Array:
    """Put zeros around the spatial axes."""
    pairs = [(0, 0, 0), *((low, high, 0) for low, high in spatial), (0, 0, 0)]
    return lax.pad(array, jnp.zeros((), array.dtype), pairs)


def _window(
    array: Array,
    starts: Sequence[int],
    spans: Sequence[int],
    strides: Sequence[int],
    channels: tuple[int, int] | None = None,
) -> Array:
    """Slice the spatial axes, and, from ``(start, size)``, the channels."""
    first, depth = channels or (0, array.shape[-1])
    stops = [start + span for start, span in zip(starts, spans, strict=True)]
    limits = (array.shape[0], *stops, first + depth)
    return lax.slice(array, (0, *starts, first), limits, (1, *strides, 1))
