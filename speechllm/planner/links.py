"""What the links between GPUs are, and how long a collective takes on them. Imports no torch.

A message of n bytes takes alpha + n / B seconds on a link of latency alpha and B bytes a second
(the alpha-beta model); p ranks run a ring or a tree of such messages:

- ring (Thakur, Rabenseifner and Gropp 2005, doi:10.1177/1094342005051521): all-gather and
  reduce-scatter take p - 1 hops of n / p bytes, (p - 1) alpha + (p - 1) / p n / B; an all-reduce is
  one of each. Few bytes, many hops: for large messages.
- tree, for all-reduce alone (two trees at once: Sanders, Speck and Traeff 2009,
  doi:10.1016/j.parco.2009.09.001): up and down, 2 ceil(log2 p) alpha + 2 n / B. Few hops: for small
  messages, and for many ranks.

The faster one is taken, as communication libraries do. What the additions of a reduction cost is
in B, which is measured or given. Over several nodes a lap of the ring crosses each node's network
once and its own links else, and the slowest link sets the pace; the tree climbs within the nodes,
then between them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

from speechllm.errors import UserError

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]
RATES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}  # as makers of networks count
TIMES = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # of them in a second


@dataclass(frozen=True)
class Link:
    """seconds: latency of one hop. bytes_per_second: each way."""

    seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class Network:
    """intra: between two GPUs of a node, for each GPU. inter: between nodes, for each node, whose
    GPUs share it. given: whether a person has said so; else it is one of PRESETS."""

    name: str
    intra: Link
    inter: Link
    given: bool = False

    @property
    def text(self) -> str:
        return (
            f"{self.name} (intra {_link_text(self.intra)} a GPU, inter {_link_text(self.inter)} a "
            "node, each way)"
        )


# Rates are four fifths of the nominal ones (NVLink 3: 300 GB/s each way; PCIe 4 x16: 32 GB/s; one
# port of 200, 100, 10 Gb/s a node), which leaves room for protocols. Latencies are of the order
# that libraries see through their own software. None of them was measured here, but for gloo-local:
# two ranks on the two cores of a virtual machine (AMD EPYC), gloo over TCP on loopback.
PRESETS = {
    network.name: network
    for network in (
        Network("nvlink+ib200", Link(5e-6, 240e9), Link(10e-6, 20e9)),
        Network("nvlink+8xib200", Link(5e-6, 240e9), Link(10e-6, 160e9)),
        Network("nvlink+eth100", Link(5e-6, 240e9), Link(30e-6, 10e9)),
        Network("pcie+eth10", Link(10e-6, 25.6e9), Link(50e-6, 1e9)),
        Network("gloo-local", Link(250e-6, 0.6e9), Link(250e-6, 0.6e9)),
    )
}
DEFAULT = "nvlink+ib200"


def parse_link(text: str) -> Network:
    """A name of PRESETS, or `intra=300GB/s,inter=25GB/s,latency=5us`, what is left out being as in
    the default preset; a name may come first: `nvlink+eth100,latency=20us`.

    GB/s are bytes (1e9 of them), Gb/s or Gbit/s are bits. `latency` is of every hop.

    Raises UserError.
    """
    first, *rest = (part.strip() for part in text.split(","))
    network = PRESETS.get(first, PRESETS[DEFAULT])
    if first not in PRESETS:
        rest = [first, *rest]
    intra, inter = network.intra, network.inter
    for part in rest:
        key, _, value = (side.strip() for side in part.partition("="))
        if key == "intra":
            intra = replace(intra, bytes_per_second=_rate(value))
        elif key == "inter":
            inter = replace(inter, bytes_per_second=_rate(value))
        elif key == "latency":
            intra, inter = (replace(link, seconds=_seconds(value)) for link in (intra, inter))
        else:
            raise UserError(
                f"--link {part!r}: write intra=300GB/s,inter=25GB/s,latency=5us, or one of "
                f"{', '.join(PRESETS)}"
            )
    return Network(text, intra, inter, given=True) if rest else network


def collective_seconds(
    kind: Kind, size: float, ranks: int, network: Network, gpus_per_node: int
) -> float:
    """Seconds of one collective.

    size: bytes of the whole tensor: what is reduced, what an all-gather ends with, what a
    reduce-scatter begins with.
    """
    if ranks == 1:
        return 0.0
    nodes = -(-ranks // gpus_per_node)
    slowest = network.intra.bytes_per_second
    if nodes > 1:
        slowest = min(slowest, network.inter.bytes_per_second)
    across = nodes - 1
    hops = (ranks - 1 - across) * network.intra.seconds + across * network.inter.seconds
    once = hops + (ranks - 1) / ranks * size / slowest
    if kind != "all_reduce":
        return once
    climb = _levels(min(ranks, gpus_per_node)) * network.intra.seconds
    climb += _levels(nodes) * network.inter.seconds
    return min(2 * once, 2 * (climb + size / slowest))


def sent_bytes(kind: Kind, size: float, ranks: int) -> float:
    """What a rank of a ring sends, and receives: (p - 1) / p n, twice for an all-reduce
    (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002)."""
    return (2 if kind == "all_reduce" else 1) * (ranks - 1) / ranks * size


def _levels(count: int) -> int:
    """Of a binary tree over `count`: ceil(log2 count)."""
    return math.ceil(math.log2(count))


def _rate(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)(B|b|bit)(?:/|p)s", text)
    rate = float(match[1]) * RATES[match[2]] if match else 0.0
    if match is None or not rate:
        raise UserError(f"--link {text!r}: not a rate; write 25GB/s for bytes, 200Gb/s for bits")
    return rate if match[3] == "B" else rate / 8


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(s|ms|us|ns)", text)
    if match is None:
        raise UserError(f"--link latency={text}: not a time; write 5us or 0.1ms")
    return float(match[1]) / TIMES[match[2]]


def _link_text(link: Link) -> str:
    return f"{link.bytes_per_second / 1e9:g} GB/s, {link.seconds * 1e6:g} us"
