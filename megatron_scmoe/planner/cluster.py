"""A cluster as numbers, and the times of collectives on it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Peak numbers of one GPU in its node, from data sheets.

    Bandwidths are one direction, for each GPU: half of what NVIDIA quotes as total.
    """

    gpus_per_node: int
    tflops: float
    """Dense bf16."""
    intra_node_gbytes: float
    network_gbytes: float | None
    """None: the source knows one node."""
    memory_gib: float
    source: str


PRESETS = {
    "a30-pcie": Preset(
        gpus_per_node=8,
        tflops=165,
        intra_node_gbytes=32,
        network_gbytes=None,
        memory_gib=24,
        source="NVIDIA A30 data sheet: 165 TFLOPS bf16, PCIe Gen4 64 GB/s, 24 GB; 8 GPUs as in "
        "arXiv:2404.05019",
    ),
    "a800-nvlink": Preset(
        gpus_per_node=8,
        tflops=312,
        intra_node_gbytes=200,
        network_gbytes=None,
        memory_gib=80,
        source="NVIDIA A100/A800 data sheets: 312 TFLOPS bf16, NVLink 400 GB/s, 80 GB; 8 GPUs as "
        "in arXiv:2404.05019",
    ),
    "h100-infiniband": Preset(
        gpus_per_node=8,
        tflops=989,
        intra_node_gbytes=450,
        network_gbytes=50,
        memory_gib=80,
        source="NVIDIA H100 SXM data sheet: 989 TFLOPS bf16, NVLink 900 GB/s, 80 GB; DGX H100: "
        "one 400 Gb/s InfiniBand port for each of 8 GPUs",
    ),
}


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs and what connects them.

    Bandwidths are bytes/s, one direction, for each GPU.
    """

    gpus_per_node: int
    intra_node_bandwidth: float
    network_bandwidth: float | None
    """None: unknown, exchanges must not leave a node."""
    efficiency: float
    """Share of the bandwidths that an all-to-all reaches."""
    message_latency: float = 0.0
    """Seconds that an all-to-all needs for each peer, whatever the size."""

    def ranks_in_node(self, ranks: int, stride: int = 1) -> int:
        """How many of the ranks 0, stride, 2 * stride, ... share the first one's node."""
        return max(1, min(ranks, self.gpus_per_node // stride))

    def share_leaving_node(self, ranks: int, stride: int = 1) -> float:
        """Part of a uniform all-to-all's data that crosses the network."""
        return 1 - self.ranks_in_node(ranks, stride) / ranks

    def all_to_all_seconds(self, sent: float, ranks: int, stride: int = 1) -> float:
        """Time of an all-to-all in which every rank sends the same to every rank.

        Links within a node and the network work at the same time; the slower of the two decides.
        What a rank sends to itself takes no time.

        Args:
            sent: bytes that one rank sends, itself included.
            ranks: size of the group.
            stride: distance of its members, the expert tensor parallel size.

        Raises:
            ValueError: the group leaves the node and the network is unknown.
        """
        if ranks == 1:
            return 0.0
        local = self.ranks_in_node(ranks, stride)
        seconds = sent * (local - 1) / ranks / self.intra_node_bandwidth
        if local < ranks:
            leaving = sent * self.share_leaving_node(ranks, stride)
            what = f"an all-to-all over {ranks} ranks leaves the node ({local} of them share one)"
            seconds = max(seconds, leaving / self._network(what))
        return seconds / self.efficiency + self.message_latency * (ranks - 1)

    def two_hops_seconds(self, across: float, inside: float, ranks: int, stride: int = 1) -> float:
        """Time of an all-to-all between nodes, and then of one between the ranks of each.

        Args:
            across: bytes that one rank sends to ranks of its place in all nodes, its own included.
            inside: bytes that it hands on in its node, to itself included.
            ranks, stride: as of `all_to_all_seconds`.

        Raises:
            ValueError: the group leaves the node and the network is unknown.
        """
        local = self.ranks_in_node(ranks, stride)
        there = self.all_to_all_seconds(across, ranks // local, stride * self.gpus_per_node)
        return there + self.all_to_all_seconds(inside, local, stride)

    def ring_seconds(self, held: float, ranks: int, stride: int = 1) -> float:
        """Time of a reduce-scatter or an all-gather; an all-reduce is both.

        Every rank passes on all but its own part. As many rings leave a node as the group has GPUs
        there, each by a link of its own.

        Args:
            held: bytes that every rank holds before, or after.
            ranks: size of the group.
            stride: distance of its members.

        Raises:
            ValueError: the group leaves the node and the network is unknown.
        """
        local = self.ranks_in_node(ranks, stride)
        passed_on = held * (ranks - 1) / ranks
        seconds = passed_on / self.intra_node_bandwidth if local > 1 else 0.0
        if local < ranks:
            network = self._network(f"gradients of {ranks} ranks leave the node")
            seconds = max(seconds, passed_on / (local * network))
        return seconds / self.efficiency

    def _network(self, what: str) -> float:
        if self.network_bandwidth is None:
            raise ValueError(f"{what} and no network is known: add --cluster-network-gbytes.")
        return self.network_bandwidth
