"""The state of deployments, as Ray Serve reports it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def deployments_of(application: str, names: Iterable[str]) -> dict[str, Any]:
    """What Ray Serve says of these deployments. Raises `KeyError` for an application that it does not know (yet)."""
    from ray import serve

    found = serve.status().applications[application].deployments
    return {name: found[name] for name in names}


def running_replicas(deployment: Any) -> int:
    """The number of its replicas that can answer."""
    return int(deployment.replica_states.get("RUNNING", 0))
