"""Which executor is named, and what is wrong with it, before anything is computed."""

from __future__ import annotations

import importlib.util

import pytest

from harness.executors.choice import executor_problems


@pytest.mark.parametrize(
    ("executor", "address", "artifacts", "message"),
    [
        ("slurm", None, None, "choose from local, ray"),
        ("local", "auto", None, "add --executor ray"),
        ("local", None, "s3://bucket", "add --executor ray"),
        ("ray", "ray://head:10001", None, "--address auto"),
        ("ray", None, "relative/folder", "s3://bucket/folder"),
        ("ray", None, "nosuch://bucket", "nosuch"),
    ],
)
def test_mistakes(executor: str, address: str | None, artifacts: str | None, message: str, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    problems = executor_problems(executor, address, artifacts)
    assert [message in str(problem) for problem in problems] == [True]


def test_what_is_right(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert not executor_problems("local", None, None)
    assert not executor_problems("ray", "10.0.0.1:6379", "/shared/artifacts")
    assert not executor_problems("ray", None, "memory://cells")


def test_ray_that_is_not_there(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install" in str(executor_problems("ray", None, None)[0])
