"""The server's tests need its packages."""

import pytest

for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason='pip install "awq-jax[serve]"')
