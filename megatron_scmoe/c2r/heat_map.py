"""A picture of which experts are chosen together, a square for every layer."""

import base64
import struct
import zlib
from html import escape

import numpy as np

from megatron_scmoe.c2r.collaboration import Collaboration, LayerCounts

SIDE, GAP, MARGIN = 220, 40, 24  # pixels
ACROSS = 4
TITLE = 2 * MARGIN + 520  # room for it
LIGHT, DARK = np.array([247, 251, 255]), np.array([8, 48, 107])


def heat_map(counts: Collaboration, orders: dict[int, np.ndarray] | None = None) -> str:
    """An SVG: row i, column j is darker the more of expert i's pairs are with expert j.

    Args:
        orders: experts of a layer in the order in which they are drawn, [N]; by number without.
    """
    rows = -(-len(counts.layers) // ACROSS)
    across = min(len(counts.layers), ACROSS)
    width = max(2 * MARGIN + across * (SIDE + GAP) - GAP, TITLE)
    height = 2 * MARGIN + rows * (SIDE + GAP)
    title = (
        f"Row: an expert. Column: its partners; the darker, the more of its pairs "
        f"({counts.experts} experts, top-{counts.topk})"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{MARGIN}" y="{MARGIN - 8}">{escape(title)}</text>',
    ]
    for place, (number, layer) in enumerate(counts.layers.items()):
        x = MARGIN + place % ACROSS * (SIDE + GAP)
        y = MARGIN + place // ACROSS * (SIDE + GAP) + GAP // 2
        order = np.arange(counts.experts) if orders is None else orders[number]
        data = base64.b64encode(_png(_colours(layer, order))).decode()
        parts += [
            f'<text x="{x}" y="{y - 4}">layer {number}</text>',
            f'<image x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" preserveAspectRatio="none" '
            f'style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>',
            f'<rect x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#888"/>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _colours(layer: LayerCounts, order: np.ndarray) -> np.ndarray:
    """Red, green and blue of every pair, [N, N, 3]; the darkest is the largest share."""
    shares = layer.together / np.maximum(layer.together.sum(axis=1, keepdims=True), 1)
    shares = shares[np.ix_(order, order)]
    strength = (shares / max(shares.max(), 1e-9))[..., None]
    return (LIGHT + strength * (DARK - LIGHT)).round().astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    """[height, width, 3] as a file."""
    height, width, _ = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )
