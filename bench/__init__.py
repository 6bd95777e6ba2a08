"""Benchmarks: ours and the peers' code in turn on the same data. Run them with `python -m bench`."""
