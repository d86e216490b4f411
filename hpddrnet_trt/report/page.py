"""A page in one file: a template of this package, filled; it loads nothing from outside."""

from __future__ import annotations

from typing import Any

from hpddrnet_trt.core.errors import require
from hpddrnet_trt.core.text import number, percent


def render(template: str, *, filters: dict[str, Any] | None = None, **values: Any) -> str:
    """The template (its path inside the package) filled with ``values``; texts are escaped.

    Templates may use the filters ``percent`` and ``number``, and those given. Raises
    :class:`MissingDependency` without jinja2.
    """
    jinja2 = require("jinja2", "benchmark", "write the report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hpddrnet_trt", "."),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(percent=percent, number=number, **(filters or {}))
    page: str = environment.get_template(template).render(**values)
    return page
