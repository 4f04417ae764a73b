"""`cluster.min_nodes`: every number of nodes that the run may come down to is checked before submission."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

from hpcdl.errors import Fault
from hpcdl.spec import ClusterSpec, ExperimentSpec


def bounds(cluster: ClusterSpec) -> Iterator[Fault]:
    """No more than the run has at most; and only Slurm gives nodes."""
    least = cluster.min_nodes
    if least is None:
        return
    if cluster.kind != "slurm":
        yield _fault(least, "only Slurm's jobs have nodes to lose", "null", "null")
    elif least > cluster.nodes:
        yield _fault(
            least, f"the run has cluster.nodes={cluster.nodes}", f"1 to {cluster.nodes}", str(cluster.nodes)
        )


def sizes(spec: ExperimentSpec, judge: Callable[[ExperimentSpec], Iterable[Fault]]) -> Iterator[Fault]:
    """The first size between min_nodes and nodes that can't be, in the words of what refuses it.

    Args:
        spec: an experiment that can be with all of its nodes.
        judge: all rules that an experiment must keep.
    """
    cluster = spec.cluster
    for nodes in range((cluster.min_nodes or cluster.nodes), cluster.nodes):
        smaller = dataclasses.replace(cluster, nodes=nodes, min_nodes=None)
        for fault in judge(dataclasses.replace(spec, cluster=smaller)):
            problem = (
                f"with {nodes} of {cluster.nodes} nodes {fault.key}={fault.value} can't be: {fault.problem}"
            )
            yield _fault(cluster.min_nodes or 0, problem, "sizes that all fit; null: all nodes", "null")
            return


def _fault(value: int, problem: str, allowed: str, fix: str) -> Fault:
    return Fault(
        key="cluster.min_nodes",
        value=str(value),
        problem=problem,
        allowed=allowed,
        fix=f"cluster.min_nodes={fix}",
    )
