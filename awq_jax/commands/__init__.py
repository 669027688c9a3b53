"""The subcommands of ``awq-jax``: each module has ``add(subparsers)`` and imports JAX only when it runs."""
