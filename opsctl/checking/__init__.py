"""Preflight: what would break a provision or an engine on a host, before anything is changed. ``table.py`` is first.

``probe.py`` runs on the host and captures texts; ``findings_*.py`` judge them, pure; ``table.py`` names every check;
``hosts.py`` asks all hosts at once.
"""
