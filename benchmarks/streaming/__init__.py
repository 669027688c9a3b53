"""The measurements that `stream.py` runs."""
