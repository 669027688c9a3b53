"""Processes with several simulated devices: their number is fixed when JAX starts."""

from __future__ import annotations

import os


def environment(devices: int) -> dict[str, str]:
    """This process's environment, other flags of XLA kept, with ``devices`` simulated CPU devices."""
    count = "--xla_force_host_platform_device_count"
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(count)]
    return os.environ | {"XLA_FLAGS": " ".join([*flags, f"{count}={devices}"]), "JAX_PLATFORMS": "cpu"}
