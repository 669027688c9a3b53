"""The layers that the families are put together from."""
