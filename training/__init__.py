"""How a network learns; the path of a batch begins in `loops.py`."""
