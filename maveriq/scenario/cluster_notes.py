"""What a cluster is made of, for readers of results; a name such as 8xA6000 says it already."""

from __future__ import annotations

from collections import Counter

from maveriq.domain.cluster import Cluster


def note_on_cluster(cluster: Cluster) -> tuple[str, ...]:
    """Return a note with the GPUs, the nodes and the price of a cluster that is not one node of one kind."""
    has_prices = any(node.usd_per_hour is not None for node in cluster.nodes)
    if len(cluster.kinds) == 1 and not cluster.has_network and not has_prices:
        return ()
    counts = Counter(gpu.kind for gpu in cluster.gpus)
    gpus = ", ".join(f"{count} x {kind} on {_nodes(cluster, kind)}" for kind, count in counts.items())
    return (f"cluster {cluster.name}: {gpus}{_price(cluster)}",)


def _nodes(cluster: Cluster, kind: str) -> str:
    nodes = {gpu.node for gpu in cluster.gpus if gpu.kind == kind}
    if len(nodes) == 1:
        return "1 node"
    return f"{len(nodes)} nodes with {cluster.network_gbps(kind):g} Gbit/s between them"


def _price(cluster: Cluster) -> str:
    prices = [cluster.usd_per_hour(gpu) for gpu in cluster.gpus]
    known = [price for price in prices if price is not None]
    return f"; ${sum(known):,.2f} an hour" if len(known) == len(prices) else ""
