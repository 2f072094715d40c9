"""A picture of which experts are chosen together, a square for every layer."""

import base64
from html import escape
from io import BytesIO

import numpy as np
from PIL import Image

from megatron_scmoe.c2r.collaboration import Collaboration, LayerCounts

SIDE, GAP, MARGIN = 220, 40, 24  # pixels
ACROSS = 4
TITLE = 2 * MARGIN + 520  # room for it
LIGHT, DARK = np.array([247, 251, 255]), np.array([8, 48, 107])


def heat_map(counts: Collaboration) -> str:
    """An SVG: row i, column j is darker the more of expert i's pairs are with expert j."""
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
        data = base64.b64encode(_png(_colours(layer))).decode()
        parts += [
            f'<text x="{x}" y="{y - 4}">layer {number}</text>',
            f'<image x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" preserveAspectRatio="none" '
            f'style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>',
            f'<rect x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#888"/>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _colours(layer: LayerCounts) -> np.ndarray:
    """Red, green and blue of every pair, [N, N, 3]; the darkest is the largest share."""
    shares = layer.together / np.maximum(layer.together.sum(axis=1, keepdims=True), 1)
    strength = (shares / max(shares.max(), 1e-9))[..., None]
    return (LIGHT + strength * (DARK - LIGHT)).round().astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    """[N, N, 3] as a file."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
