"""The form in which a model's weights are served, which need not be the one in which they are kept."""

import logging
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from awq_jax import kernels, paths
from awq_jax.errors import WeightError
from awq_jax.models.config import ModelConfig
from awq_jax.models.mesh import unfuse
from awq_jax.models.weights import fuse
from awq_jax.placement import Placement
from awq_jax.qtensor import Weight, is_quantized
from awq_jax.serve import cpu_copy
from awq_jax.serve.generate import Generator

log = logging.getLogger(__name__)

FEW = (
    16  # tokens that a CPU generates from packed weights as they are in less time than it takes to copy and merge them
)

# Else XLA on CPU, to have work for more threads, writes out the floats of all layers at once.
LESS_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


class ServedWeights:
    """Parameters of one model, kept and served.

    Packed weights are served merged (see `awq_jax.models.weights.fuse`) and in the layout of the kernel that
    reads them. That form is exact, so it *replaces* the other until `take_params` asks for that again: there
    are never two packed copies. On CPU 16-bit floats become float32 ones for as long, and so do activations and
    the cache; up to `FEW` tokens are generated from weights that are not merged. Where no compiled kernel multiplies by
    the packed weights, a float32 copy is served to more tokens, and they stay (see `awq_jax.serve.cpu_copy`).

    Args:
      graphdef, config: of the decoder.
      params: its parameters.
      merge_linears: serve linears that read the same activation as one; None: where any is packed.
      copy: serve a dequantized float32 copy; None: on CPU, where there is no compiled kernel for them all, if it takes
        at most half of the free memory.
      place: the mesh over which the parameters are spread, or None.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        config: ModelConfig,
        params: nnx.State,
        merge_linears: bool | None = None,
        copy: bool | None = None,
        place: Placement | None = None,
    ):
        self.graphdef, self.config, self.place = graphdef, config, place
        self.merge_linears, self.copy = merge_linears, copy
        self._kept: nnx.State | None = params
        self._served: nnx.State | None = None
        self._fused = self._apart = config
        self._dtypes: dict[str, str] = {}
        self._generators = {(config, False): Generator(graphdef, config, place)}
        self._less_memory = self._for_few = False
        self._explanation, self._size = "", 0

    def take_params(self) -> nnx.State:
        """The parameters as they were given, rebuilt if the form that is served has replaced them.

        That form is then given up, and made again when it is next needed.

        Raises:
          WeightError: an error, as for want of memory, ended their conversion to the form that is served.
        """
        if self._kept is None:
            if self._served is None:
                raise WeightError(
                    "the weights were lost when their conversion for serving failed; load the model again"
                )
            leaves = paths.flatten(self._served)
            self._served = None
            for path in leaves:
                leaves[path] = kernels.canonical(leaves[path])
            fuse.unmerged(self._apart, self._fused, leaves)
            if self.place is not None:
                unfuse.together(self.config, leaves, self.place)
            for path, dtype in self._dtypes.items():
                leaves[path] = cpu_copy.narrowed(leaves[path], dtype)
            self._kept = fuse.assemble(self.config, leaves)[1]
        return self._kept

    def replace(self, params: nnx.State) -> None:
        """Keep and serve other parameters of the same model."""
        self._kept, self._served = params, None

    def as_held(self) -> tuple[Generator, nnx.State]:
        """The exact parameters in the form they are in now, and the programs for that form."""
        if self._kept is None and self._served is None:
            self.take_params()  # which says that they are lost
        if self._kept is None:
            return self._serving()
        return self._generators[self.config, False], self._kept

    def nbytes(self) -> int:
        """Bytes of the parameters as they were given."""
        return self._size if self._kept is None else paths.nbytes(self._kept)

    def packed(self) -> bool:
        """Whether any weight is."""
        _, params = self.as_held()
        return any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))

    def serving(self, tokens: int | None = None) -> tuple[Generator, nnx.State]:
        """The parameters to generate with, and the programs for them.

        Args:
          tokens: as many are generated at most; None: many.
        """
        few = tokens is not None and tokens <= FEW
        if self._served is not None and self._for_few and not few:
            self.take_params()
        if self._served is None:
            self._served = self._prepare(few)
            log.info("%s", self._explanation)
        return self._serving()

    def _serving(self) -> tuple[Generator, nnx.State]:
        assert self._served is not None
        return self._generators[self._fused, self._less_memory], self._served

    def explain(self) -> str:
        """One line on the form in which the weights are served, with its bytes."""
        if self._served is None:
            self.serving()
        return self._explanation

    def _prepare(self, few: bool) -> nnx.State:
        params = self.take_params()
        leaves, self._size = paths.flatten(params), paths.nbytes(params)
        del params
        platform = next(iter(jax.tree.leaves(leaves)[0].devices())).platform
        packed = any(map(is_quantized, leaves.values()))
        copy, why = self._choose(leaves, platform, few) if packed else (False, "")
        if copy:
            added = cpu_copy.nbytes(leaves)
            notes = [f"a float32 copy of {_mb(added)} beside packed weights of {_mb(self._size)}{why}"]
            leaves = cpu_copy.resident(leaves)
        else:
            self._kept = None  # replaced part by part
            notes = [f"{'packed' if packed else 'float'} weights of {_mb(self._size)}{why}"]
            self._dtypes = {}
            if packed and platform == "cpu" and (added := cpu_copy.widening(leaves)) and _fits(added):
                self._dtypes = {path: jnp.dtype(leaf.dtype).name for path, leaf in leaves.items()}
                for path in leaves:
                    leaves[path] = cpu_copy.widened(leaves[path])
                notes.append(f"16-bit floats as float32, which takes {_mb(added)} more")
        self._fused = self._apart = self.config
        if self.place is not None:
            self._fused = self._apart = unfuse.apart(self.config, leaves, self.place)
        if packed and not self._for_few if self.merge_linears is None else self.merge_linears:
            self._fused = fuse.merged(self._apart, leaves)
            was, now = (len(list(fuse.fusable(c))) for c in (self._apart, self._fused))
            notes.append(f"{was - now} of {was} groups of linears that read the same activation merged")
        for path in leaves:
            leaves[path] = kernels.prepare(leaves[path], platform)
        graphdef, served = fuse.assemble(self._fused, leaves)
        self._less_memory = packed and not copy and platform == "cpu"
        options = LESS_MEMORY if self._less_memory else None
        self._generators.setdefault(
            (self._fused, self._less_memory), Generator(graphdef, self._fused, self.place, options)
        )
        self._explanation = "served as " + "; ".join(notes)
        return served

    def _choose(self, leaves: Mapping[str, Weight], platform: str, few: bool) -> tuple[bool, str]:
        """Whether to serve a copy, and why."""
        self._for_few = False
        if self.copy is not None:
            return self.copy, ", as was asked for"
        if platform != "cpu" or self.place is not None:
            return False, ""
        if (reason := cpu_copy.reason(leaves)) is None:
            self._for_few = few
            return False, ", multiplied as they are by compiled code"
        need = cpu_copy.nbytes(leaves)
        if not _fits(need):
            return (
                False,
                f"; a float32 copy would take {_mb(need)}, more than half of what is free (resident=True makes one)",
            )
        if few:
            self._for_few = True
            return False, f"; a float32 copy of {_mb(need)} is made for more than {FEW} tokens at once, since {reason}"
        return True, f" (resident=False saves it), since {reason}"


def _fits(size: int) -> bool:
    room = cpu_copy.room()
    return room is None or size <= cpu_copy.SHARE * room


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
