"""The fleet: inventory and services.yml to one frozen model, and what is computed from it. Open ``inventory.py`` first.

``inventory`` orders the reading, ``ansible_inventory`` runs ansible-inventory, ``hosts``, ``groups``, ``versions`` and
``services`` check what came; ``placements`` computes ports and server lists; ``ssh_config`` and ``trust`` say how to
log in and whom to believe; ``project`` makes a fleet's directory.
"""
