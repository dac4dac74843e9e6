"""The bytes, the arithmetic and the modelled time of recorded launches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from recordings import Events, launches

ITEM_BYTES = {
    "Byte": 1, "Char": 1, "Bool": 1, "Half": 2, "BFloat16": 2, "Short": 2, "Int": 4, "Float": 4, "Long": 8, "Double": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Card:
    """What limits a launch.

    Attributes:
        source: where the numbers are from.
        memory: bytes a second.
        products: floating-point operations a second of bf16 matrix products.
        int8_products: the same of int8.
        launch: seconds of a launch in a replayed graph that nothing else hides.
        link: bytes a second from one card to another.
        exchange: seconds of a collective without bytes.
    """

    source: str
    memory: float
    products: float
    int8_products: float
    launch: float
    link: float
    exchange: float


ASCEND_910B3 = Card(
    source=(
        "published peaks of a 910B3 (64 GB): HBM 1.6 TB/s, bf16 313 TFLOP/s, int8 twice that, HCCS 56 GB/s between two "
        "cards; assumed: 0.8 of the memory's peak, 0.7 of the products', 3 us a launch, 20 us a collective"
    ),
    memory=0.8 * 1.6e12,
    products=0.7 * 313e12,
    int8_products=0.7 * 626e12,
    launch=3e-6,
    link=0.8 * 56e9,
    exchange=20e-6,
)

H200 = Card(
    source="scripts/bench/results/nvidia-h200-*.json: copy 4.09 TB/s and bf16 products 647 TFLOP/s, as measured; "
    "assumed: 1.5 us a launch",
    memory=4.09e12,
    products=647e12,
    int8_products=2 * 647e12,
    launch=1.5e-6,
    link=400e9,
    exchange=10e-6,
)


class Operand(NamedTuple):
    """A tensor of a launch, or the numbers of an array (``how`` is n)."""

    how: str
    dtype: str
    sizes: tuple[int, ...]

    @property
    def items(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        return self.items * ITEM_BYTES[self.dtype]


class Launch(NamedTuple):
    """A recorded launch."""

    name: str
    operands: tuple[Operand, ...]

    @property
    def tensors(self) -> list[Operand]:
        return [operand for operand in self.operands if operand.how != "n"]

    @property
    def is_int8(self) -> bool:
        return self.name == "aclnnQuantMatmulV5"


def of_events(events: Events) -> list[Launch]:
    return [
        Launch(event["name"], tuple(Operand(how, kind, tuple(sizes)) for how, kind, sizes in event["operands"]))
        for event in launches(events)
        if event.get("operands")
    ]


def whole_model(one: list[Launch], two: list[Launch], layers: int) -> Counter[Launch]:
    """Returns the launches of a model with some layers, from those with one and with two."""
    layer = Counter(two) - Counter(one)
    whole = Counter(one) - layer
    for launch, count in layer.items():
        whole[launch] += count * layers
    return whole


def _product(launch: Launch) -> float:
    """2 m n k: k are the columns of the first factor, which is the second operand of a product with an addend."""
    first = launch.tensors[1 if launch.name in ("aclnnAddmm", "aclnnBaddbmm") else 0]
    return 2.0 * _result(launch).items * first.sizes[-1]


def _result(launch: Launch) -> Operand:
    return next(operand for operand in reversed(launch.tensors) if operand.how == "w")


def _convolution(launch: Launch) -> float:
    weight = launch.tensors[1]
    return 2.0 * _result(launch).items * weight.items / weight.sizes[0]


def _several_sequences(launch: Launch) -> float:
    _, heads, head_dim = launch.tensors[0].sizes
    queries, keys = (
        [end - start for start, end in zip((0, *ends), ends, strict=False)]
        for ends in (operand.sizes for operand in launch.operands if operand.how == "n" and operand.sizes)
    )
    return sum(4.0 * q * k for q, k in zip(queries, keys, strict=True)) * heads * head_dim


def _attention(launch: Launch) -> float:
    query, keys = launch.tensors[:2]
    return 4.0 * query.items * max(keys.sizes[1:3])


PRODUCTS = ("aclnnMatmul", "aclnnMm", "aclnnBatchMatMul", "aclnnAddmm", "aclnnBaddbmm", "aclnnQuantMatmulV5")
WEIGHT_PRODUCTS = (*PRODUCTS, "aclnnWeightQuantBatchMatmulV2")
FLOP: Mapping[str, Callable[[Launch], float]] = {
    **dict.fromkeys(WEIGHT_PRODUCTS, _product),
    "aclnnConvolution": _convolution,
    "aclnnFlashAttentionVarLenScore": _several_sequences,
    "aclnnFlashAttentionScore": _attention,
    "aclnnFusedInferAttentionScoreV3": _attention,
}
# Of these only the selected part of the first tensor is read or written: as much as of the last.
SELECTING = ("aclnnEmbedding", "aclnnIndex", "aclnnIndexSelect", "aclnnIndexPutImpl", "aclnnInplaceScatterUpdate")


def flop(launch: Launch) -> float:
    """Returns the operations of the matrix unit."""
    return FLOP[launch.name](launch) if launch.name in FLOP else 0.0


def moved_bytes(launch: Launch) -> int:
    """Returns the bytes that are read and written."""
    tensors = launch.tensors
    if launch.name in SELECTING:
        return sum(operand.bytes for operand in tensors[1:]) + tensors[-1].bytes
    return sum(operand.bytes for operand in tensors)


class Cost(NamedTuple):
    """Of a step."""

    launches: int
    bytes: float
    flop: float
    seconds: float

    def fields(self) -> dict[str, Any]:
        return {"launches": self.launches, "gb": self.bytes / 1e9, "tflop": self.flop / 1e12}


def cost(counted: Mapping[Launch, int], card: Card, share: Callable[[Launch], float] = lambda _: 1.0) -> Cost:
    """Models a step: a launch takes as long as the slower of its bytes and its arithmetic, plus the launch itself.

    ``share`` is the part of a launch that one of several cards has.
    """
    total = [0, 0.0, 0.0, 0.0]
    for launch, count in counted.items():
        part = share(launch)
        bytes_, flop_ = moved_bytes(launch) * part, flop(launch) * part
        rate = card.int8_products if launch.is_int8 else card.products
        seconds = max(bytes_ / card.memory, flop_ / rate) + card.launch
        for index, value in enumerate((1, bytes_, flop_, seconds)):
            total[index] += value * count
    return Cost(int(total[0]), *total[1:])


def largest(counted: Mapping[Launch, int], card: Card, most: int = 8) -> dict[str, float]:
    """Returns the milliseconds of the kinds of launches that take longest."""
    kinds: Counter[str] = Counter()
    for launch, count in counted.items():
        kinds[launch.name] += cost({launch: count}, card).seconds * 1e3  # type: ignore[assignment]
    return dict(kinds.most_common(most))
