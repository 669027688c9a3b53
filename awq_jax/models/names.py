"""Hugging Face tensor names <-> paths in the reference decoder's state, as data."""

import dataclasses
import re

from awq_jax.convert.source import is_recomputed

SUFFIXES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}

DEFAULTS = {
    "layers": "model.layers",
    "embed_tokens": "model.embed_tokens",
    "norm": "model.norm",
}


@dataclasses.dataclass(frozen=True)
class Names:
    """What a family's checkpoints call the tensors of the decoder.

    Without entries the names are Llama's: ``model.`` and the path with dots for slashes.

    Attributes:
      entries: ``(module, theirs)`` pairs that differ from Llama's. ``module`` is a path in the
        decoder with dots, relative to its layer for what is inside of one: ``self_attn.q_proj``,
        ``mlp``, ``norm``, ``layers``. An entry also renames all that is below it. With the name of a
        parameter at its end (``mlp.experts.down_proj.kernel``) ``theirs`` is the whole tensor name,
        without ``.weight``. ``{e}`` in ``theirs`` is the number of an expert: one tensor for each.
      aliases: other spellings of a tensor's name that are read but never written: ``(theirs, other)``
        beginnings.
      linear_out_in: linears are stored ``[out, in]``; False for GPT-2's ``[in, out]``.
      packed: ``entries`` of modules that hold packed weights, where those are called otherwise.
      carried: a regular expression: tensors whose names it finds are no part of the decoder, and are written
        again as they were read (layers that predict several tokens ahead, what sees or hears).
    """

    entries: tuple[tuple[str, str], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    linear_out_in: bool = True
    packed: tuple[tuple[str, str], ...] = ()
    carried: str = ""

    def of(self, path: str, packed: bool = False) -> str:
        """The tensor name of a parameter path; with ``{e}`` left in it where each expert has its own.

        Args:
          path: in the decoder's state.
          packed: its module holds packed weights.
        """
        *modules, leaf = path.split("/")
        inside = modules[0] == "layers"
        prefix = f"{self._top('layers')}.{modules[1]}." if inside else ""
        module = ".".join(modules[2:] if inside else modules)
        table = dict(self.entries) | dict(self.packed if packed else ())
        whole = f"{module}.{leaf}" if module else leaf
        if whole in table:
            return prefix + table[whole]
        name = self._renamed(module, table) if inside else self._top(module)
        return ".".join(filter(None, (prefix + name, SUFFIXES.get(leaf, leaf))))

    def spellings(self, name: str) -> list[str]:
        """All names under which the tensor called ``name`` may be stored, the usual one first."""
        out = [name]
        for theirs, other in (*self.aliases, (self._base(), "")):
            if theirs and name.startswith(theirs):
                out.append(other + name[len(theirs) :])
        return out

    def makes_none(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether no parameter is made of a tensor, rightly: it is recomputed, or carried through."""
        return is_recomputed(name, shape) or self.carries(name)

    def carries(self, name: str) -> bool:
        """Whether a tensor of that name makes no parameter, and is to be written as it was read."""
        return bool(self.carried and re.search(self.carried, name))

    def transposed(self, path: str, name: str) -> bool:
        """Whether the file stores the last two axes the other way round."""
        return (
            path.endswith("/kernel") and name.endswith(".weight") and (self.linear_out_in or path == "lm_head/kernel")
        )

    def _base(self) -> str:
        """``"model."``: what checkpoints saved without a head leave out."""
        first, dot, _ = self._top("layers").rpartition(".")
        return first.split(".")[0] + dot

    def _top(self, module: str) -> str:
        return self._renamed(module, DEFAULTS | dict(self.entries))

    @staticmethod
    def _renamed(module: str, table: dict[str, str]) -> str:
        parts = module.split(".")
        for n in range(len(parts), 0, -1):
            theirs = table.get(".".join(parts[:n]))
            if theirs is not None:
                return ".".join(filter(None, (theirs, *parts[n:])))
        return module


LLAMA = Names()


def names(
    entries: dict[str, str],
    *,
    aliases: dict[str, str] | None = None,
    packed: dict[str, str] | None = None,
    linear_out_in: bool = True,
    carried: str = "",
) -> Names:
    """`Names` from dictionaries."""
    pairs = (tuple((d or {}).items()) for d in (entries, aliases, packed))
    entries_, aliases_, packed_ = pairs
    return Names(entries_, aliases_, linear_out_in, packed_, carried)
