"""Every attack that is tried against every loader."""

from __future__ import annotations

from tests.attacks import configs, files, headers, tensors
from tests.attacks.spoiling import Attack

KINDS = (
    tensors.pivots,
    tensors.shapes,
    tensors.values,
    configs.ours,
    configs.sizes,
    configs.elsewhere,
    configs.bombs,
    headers.headers,
    headers.index,
    files.links,
    files.special,
)
ATTACKS: list[Attack] = [attack for kind in KINDS for attack in kind.attacks]
