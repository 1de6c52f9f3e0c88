"""Cannot be imported."""

from dataclasses import dataclass

from harness.method import register

raise RuntimeError("broken on purpose at import")


@register("raises_at_import")
@dataclass(frozen=True)
class RaisesAtImport:
    """Never gets to be one."""
