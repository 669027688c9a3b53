"""Groups that take the scale of another, as both read one value: the gate, and experts whose rows are sorted.

What a norm makes is read by the matmul that chooses experts, by experts that all tokens share, and, sorted by expert,
by the experts that were chosen. The norm can absorb one scale only. It is searched on the chosen experts, which have
nearly all the weights; what reads the rows before they are sorted takes that scale, and its weights are multiplied.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from awq_jax.plan import channel_labels
from awq_jax.plan.channel_labels import Blocked
from awq_jax.trace.rearranged import SAME_SHAPE
from awq_jax.trace.scopes import OUTPUT, Node, Scope


class Followers:
    """Readers of scaled values that are matmuls of other groups, as one walk upstream meets them.

    Args:
      scope: where the walk goes.
      groups: those that may follow, each with all its matmuls.
    """

    def __init__(self, scope: Scope, groups: Mapping[Hashable, Sequence[Node]]) -> None:
        self._scope, self._groups = scope, groups
        self._key = {node: key for key, nodes in groups.items() for node in nodes}
        self._labels: dict[Node, np.ndarray] = {}

    def take(self, index: int, pos: int, lab: np.ndarray) -> bool:
        """Whether node ``index``, whose operand ``pos`` carries ``lab``, passes it on to such matmuls only."""
        if index == OUTPUT:
            return False
        node = self._scope.nodes[index]
        if node in self._key:
            self._labels[node] = lab
            return pos == node.op.x
        passed = _onward(node, lab)
        readers = self._scope.readers.get(node.outs[0], ()) if passed is not None else ()
        return passed is not None and all(self.take(i, p, passed) for i, p in readers)

    def channels(self) -> dict[Hashable, np.ndarray]:
        """By group that follows, int32: for each of its channels, flat over ``[*batch, K]``, the one it is scaled as.

        Raises:
          Blocked: a group has other inputs as well, or its channels are not those that are scaled.
        """
        return {
            key: self._of_group(self._groups[key]) for key in dict.fromkeys(map(self._key.__getitem__, self._labels))
        }

    def _of_group(self, nodes: Sequence[Node]) -> np.ndarray:
        found: np.ndarray | None = None
        for node in nodes:
            if node not in self._labels:
                raise Blocked("a matmul that reads it shares its own scale with others that do not")
            mine, theirs = np.broadcast_arrays(channel_labels.site_labels(node), self._labels[node])
            if found is None:
                found = np.full(int(mine.max()) + 1, channel_labels.UNIT, np.int32)
                found[mine] = theirs
            if len(found) <= mine.max() or (found < 0).any() or (found[mine] != theirs).any():
                raise Blocked("the channels of a matmul that reads it are others")
        assert found is not None
        return found


def _onward(node: Node, lab: np.ndarray) -> np.ndarray | None:
    """Labels of what ``node`` makes of its only operand by rearranging it; None if it does anything else."""
    p = node.params
    if len(node.vals()) != 1 or len(node.ins) != 1 or len(node.outs) != 1:
        return None
    if node.name in SAME_SHAPE:
        return lab
    if node.name == "transpose":
        return np.transpose(lab, p["permutation"])
    if node.name == "squeeze":
        return np.squeeze(lab, tuple(p["dimensions"]))
    if node.name == "reshape" and p.get("dimensions") is None:
        return channel_labels.reshape(lab, node.ins[0].shape, node.outs[0].shape)
    return None
