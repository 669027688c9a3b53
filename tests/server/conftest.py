"""The server's tests need its packages: pip install "awq-jax[serve]"."""

from importlib.util import find_spec

collect_ignore_glob = [] if all(map(find_spec, ("starlette", "uvicorn", "prometheus_client"))) else ["test_*.py"]
