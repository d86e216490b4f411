"""Names of a network's parts, read from the node names of an exported graph (module paths)."""

from __future__ import annotations

import re

_INNER = re.compile(r"conv\d*|bn\d*|cnn|mix|downsample|skip|shortcut")
# Modules that are one part for people, however many convolutions they hold.
_WHOLE = re.compile(r"^(.*?\.spp|.*?\.down_\d+|.*?\.compression_\d+|.*?\.sps\.\d+|.*?\.ecas\.\d+|head|detail)(\.|$)")


def block_of(node: str) -> str:
    """The part a node belongs to: ``backbone.stem.2.0.conv1.conv/Conv`` is of ``backbone.stem.2.0``.

    Residual blocks, pyramid pooling, down-sampling and compression steps, attention modules and the
    head are parts; a name without module path is its own part.
    """
    path = node.split("/")[0]
    whole = _WHOLE.match(path)
    if whole:
        return whole.group(1)
    parts = path.split(".")
    while len(parts) > 1:
        if _INNER.fullmatch(parts[-1]) or (parts[-1].isdigit() and _INNER.fullmatch(parts[-2])):
            parts.pop()
        else:
            break
    return ".".join(parts)


def short(node: str) -> str:
    """A node's name for tables: without the operator and what every name begins with."""
    return node.split("/")[0].removeprefix("backbone.").removesuffix(".conv")
