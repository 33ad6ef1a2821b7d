"""Devices that share the rows of a batch: where arrays lie on them, and how rows are taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

HOST, DEVICE = "host", "device"  # the axes of the mesh: processes, and the devices of each
ROWS = (HOST, DEVICE)

T = TypeVar("T")


@dataclass(frozen=True)
class Devices:
    """Devices among which the rows of a batch are divided; hashable, so that code can depend on it.

    Parameters are copied to each of them. So are the rows that are kept in memory, those of a host
    to its own devices: taking a batch moves no row between devices, and what a step moves is the
    sum of the gradients. Without a mesh arrays are left where they are, and nothing else is done.

    Attributes:
        mesh: the devices, with the axes ``HOST`` and ``DEVICE``, which JAX partitions by itself;
            None for the one that JAX uses by default.
    """

    mesh: Mesh | None = None

    @classmethod
    def of(cls, mesh: Any) -> Devices:
        """Return the devices of a mesh of one axis, those of each process side by side.

        Args:
            mesh: a `jax.sharding.Mesh`, or None.

        Raises:
            TypeError: if it is none.
            ValueError: if it has another number of axes, or as many devices of no two processes.

        Example:
            >>> Devices.of(Mesh(np.array(jax.devices()), "batch")).number == len(jax.devices())
            True
        """
        if mesh is None:
            return cls()
        if not isinstance(mesh, Mesh):
            raise TypeError(
                f"mesh is of type {type(mesh).__name__}, expected a jax.sharding.Mesh. Pass "
                'jax.make_mesh((jax.device_count(),), ("batch",)).'
            )
        if len(mesh.axis_names) != 1:
            raise ValueError(
                f"mesh has the axes {dict(mesh.shape)}, expected one, among whose devices the rows "
                "of a batch are divided; parameters are copied to all. Pass "
                f'jax.sharding.Mesh(mesh.devices.ravel(), "batch") for all {mesh.size} devices.'
            )
        return cls(_by_host(mesh))

    @property
    def _mesh(self) -> Mesh:
        return cast("Mesh", self.mesh)  # where it is known that there is one

    @property
    def number(self) -> int:
        """How many devices there are."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def num_hosts(self) -> int:
        """How many processes they belong to."""
        return 1 if self.mesh is None else self.mesh.shape[HOST]

    @property
    def host(self) -> int:
        """The place of this process among them."""
        if self.mesh is None or self.num_hosts == 1:
            return 0
        return [x.process_index for x in self.mesh.devices[:, 0]].index(jax.process_index())

    def require_divides(self, batch_size: int, name: str = "batch_size") -> None:
        """Raise if a batch cannot be divided evenly among the devices.

        Raises:
            ValueError: naming the numbers of rows next to it that can.
        """
        below = batch_size // self.number * self.number
        if batch_size != below:
            near = " or ".join(str(x) for x in (below, below + self.number) if x)
            raise ValueError(
                f"{name} is {batch_size}, which the {self.number} devices of the mesh do not "
                f"divide evenly. Pass a multiple of {self.number}, such as batch_size={near}."
            )

    def rounded(self, number: int) -> int:
        """Return the next number of rows that the devices divide evenly."""
        return -(-number // self.number) * self.number

    @property
    def own(self) -> Devices:
        """Those of this process."""
        if self.mesh is None:
            return self
        return Devices(Mesh(self.mesh.devices[self.host][None], (HOST, DEVICE)))

    def require_same(self, name: str, number: int) -> None:
        """Raise if hosts have different numbers of something.

        Raises:
            ValueError: naming the numbers, on all hosts alike.
        """
        if self.num_hosts > 1:
            found = self.gather(np.array(number)).tolist()
            if len(set(found)) > 1:
                raise ValueError(
                    f"The hosts have different numbers of {name}: {found}. Each takes part in "
                    "every step with as many rows: give each the same number, leaving out what is "
                    "over."
                )

    def together(self, read: Callable[[], T]) -> T:
        """Return what each host makes of its own rows, or raise on all if one of them cannot.

        A host that goes on alone would wait for the others in vain.

        Raises:
            ValueError: naming the hosts that raised an error, on those that did not.
        """
        if self.num_hosts == 1:
            return read()
        found = error = None
        try:
            found = read()
        except Exception as raised:  # of any kind, as it is raised again
            error = raised
        failed = np.flatnonzero(self.gather(np.array(error is not None)))
        if error is not None:
            raise error
        if failed.size:
            raise ValueError(
                f"The data of the hosts {failed.tolist()} were refused, of {self.num_hosts} hosts "
                "that train together: none goes on. What is wrong with them is said there."
            )
        return cast("T", found)

    def gather(self, array: np.ndarray) -> np.ndarray:
        """Return an array of each host, side by side along a new axis in front."""
        return array[None] if self.mesh is None else self.fetch(self._on(array[None], HOST))

    # -- where arrays lie -------------------------------------------------------------------------

    def put(self, tree: Any) -> Any:
        """Return a pytree of arrays with a copy on each device."""
        if self.mesh is None:
            return tree
        return jax.tree.map(partial(_of_numbers, self._put), tree)

    def _put(self, leaf: Any) -> Array:
        is_own = self.num_hosts > 1 and getattr(leaf, "is_fully_addressable", True)
        leaf = np.asarray(leaf) if is_own else leaf  # which JAX copies to other hosts' devices
        return jax.device_put(leaf, NamedSharding(self._mesh, PartitionSpec()))

    def leave(self, tree: Any) -> Any:
        """Return a pytree of arrays that each device has a copy of on the default device."""
        return tree if self.mesh is None else jax.tree.map(partial(_of_numbers, _alone), tree)

    def divide(self, rows: Any, axis: int = 0) -> Array:
        """Return an array divided among the devices along an axis; a host gives its own part.

        If they do not divide it evenly, it is copied to each of them.

        Raises:
            ValueError: if they do not, and belong to several hosts.
        """
        if self.mesh is None:
            return jnp.asarray(rows)
        if self._divides(rows.shape[axis] * self.num_hosts):
            return self._on(rows, ROWS, axis)
        if self.num_hosts == 1:
            return self.put(rows)
        raise ValueError(
            f"The {self.number} devices of {self.num_hosts} hosts do not divide evenly a batch of "
            f"{rows.shape[axis]} rows of each host, and the objective takes no rows that weigh "
            "nothing, to fill it up. Leave out the rows that are over."
        )

    def _divides(self, number: int) -> bool:
        return number % self.number == 0

    def hold(self, rows: Any, axis: int | None) -> Array:
        """Return an array of all hosts' rows, of which each device has a copy of its host's."""
        if axis is None or self.num_hosts == 1:
            return self.put(rows)
        return self._on(rows, HOST, axis % np.ndim(rows))

    def _on(self, rows: Any, names: Any, axis: int = 0) -> Array:
        sharding = NamedSharding(self._mesh, _along(names, axis))
        if self.num_hosts == 1:
            return jax.device_put(rows, sharding)
        rows = np.asarray(rows, jnp.result_type(rows))
        return jax.make_array_from_process_local_data(sharding, rows)

    def numbers(self, rows: Any, num_rows: int) -> Any:
        """Return the numbers, among all hosts' rows, of rows of this one, which has so many."""
        return rows if self.num_hosts == 1 else np.asarray(rows) + self.host * num_rows

    def own_key(self, rng_key: Array) -> Array:
        """Return a random key of this host's own."""
        return rng_key if self.num_hosts == 1 else jax.random.fold_in(rng_key, self.host)

    def fetch(self, tree: Any) -> Any:
        """Return arrays that may be divided among hosts, on each of them, as NumPy's."""
        if self.num_hosts > 1:
            tree = self.put(tree)
        return jax.tree.map(np.asarray, tree)

    # -- in compiled code -------------------------------------------------------------------------

    def take(self, array: Array, indices: Int[Array, "batch"], axis: int) -> Array:
        """Return rows of an array along an axis, each on the device that has its number.

        The numbers of a host's part of the batch are those of its own rows.
        """
        if self.mesh is None or not self._divides(len(indices)):
            return jnp.take(array, indices, axis=axis, mode="clip")
        axis %= array.ndim
        own = array.shape[axis] // self.num_hosts

        def take(array: Array, indices: Array) -> Array:
            indices = indices - own * jax.lax.axis_index(HOST)
            return jnp.take(array, indices, axis=axis, mode="clip")

        specs = (_along(HOST, axis), _along(ROWS, 0))
        shard_map = jax.shard_map(
            take, mesh=self.mesh, in_specs=specs, out_specs=_along(ROWS, axis)
        )
        return shard_map(array, indices)

    def keep(self, tree: Any) -> Any:
        """Return a pytree of arrays of which each device is to have a copy."""
        return self._constrain(tree, PartitionSpec())

    def split(self, array: Array, axis: int | None) -> Array:
        """Return an array that is to be divided among the devices along an axis."""
        return array if axis is None else self._constrain(array, _along(ROWS, axis % array.ndim))

    def _constrain(self, tree: Any, spec: PartitionSpec) -> Any:
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, spec))


def _of_numbers(fn: Callable[[Any], Array], leaf: Any) -> Array:
    """Apply a function of arrays to a leaf, to the numbers behind it if it is of random keys."""
    if not jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        return fn(leaf)
    return jax.random.wrap_key_data(fn(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))


def _alone(leaf: Array) -> Array:
    return jnp.asarray(np.asarray(leaf))


ONE_DEVICE = Devices()


def _along(names: Any, axis: int) -> PartitionSpec:
    return PartitionSpec(*[None] * axis, names)


def _by_host(mesh: Mesh) -> Mesh:
    """Return the devices of a mesh in rows, one for each process."""
    devices = sorted(mesh.devices.ravel(), key=lambda device: device.process_index)
    counts = Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1 or jax.process_index() not in counts:
        raise ValueError(
            f"mesh has devices of the processes {dict(counts)}, and this is process "
            f"{jax.process_index()}: expected as many of each process, this one among them. Pass "
            'jax.make_mesh((jax.device_count(),), ("batch",)).'
        )
    # Of axes that JAX partitions by itself, whatever those of the mesh are.
    return Mesh(np.array(devices).reshape(len(counts), -1), (HOST, DEVICE))
