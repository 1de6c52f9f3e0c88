"""What every method has to keep to, as checks that anybody can run: ``harness methods check NAME|FILE``.

In a plugin's own tests, one line::

    from harness.conformance import conformance_tests

    test_my_method = conformance_tests("my_method")
"""

from __future__ import annotations

from harness.conformance.testing import conformance_tests

__all__ = ["conformance_tests"]
