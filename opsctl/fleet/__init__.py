"""Inventory to Fleet: ``model.py`` first, then ``inventory.py`` (the only reader) and the pure ``placements.py``."""
