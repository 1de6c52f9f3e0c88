"""Which executor a request names, checked before anything is computed and without importing what it may not need."""

from __future__ import annotations

import importlib.util
import re

from harness.errors import HarnessError

EXECUTORS = ("local", "ray")
_URL = re.compile(r"([a-z0-9+]+)://")


def executor_problems(executor: str, address: str | None, artifacts: str | None) -> list[HarnessError]:
    """What is wrong with ``--executor``, ``--address`` and ``--artifacts``."""
    if executor not in EXECUTORS:
        return [HarnessError(f"--executor {executor!r} is not offered", fix=f"choose from {', '.join(EXECUTORS)}")]
    if executor == "local":
        return [
            HarnessError(f"--{flag} {value!r} is for machines of a cluster", fix="add --executor ray")
            for flag, value in (("address", address), ("artifacts", artifacts))
            if value is not None
        ]
    if importlib.util.find_spec("ray") is None:
        return [HarnessError("--executor ray needs Ray, which is not installed", fix='pip install "ptq-harness[ray]"')]
    problems = []
    if address is not None and address.startswith("ray://"):
        problems.append(
            HarnessError(
                f"--address {address!r} is Ray Client's, which does not carry what a cell says while it runs",
                fix="start the run on a machine of the cluster, with --address auto",
            )
        )
    if artifacts is not None and (problem := _artifacts_problem(artifacts)):
        problems.append(problem)
    return problems


def _artifacts_problem(url: str) -> HarnessError | None:
    import fsspec

    match = _URL.match(url)
    if match is None:
        return (
            None
            if url.startswith("/")
            else HarnessError(
                f"--artifacts {url!r} is no folder that all machines share",
                fix="/shared/folder, or a URL: s3://bucket/folder",
            )
        )
    try:
        fsspec.get_filesystem_class(match[1])
    except (ValueError, ImportError) as error:
        return HarnessError(f"--artifacts {url!r}: {error}", fix="install what it names on every machine")
    return None
