"""One file per verb: parses, orders, speaks; no logic. ``main.py`` collects them, ``speak.py`` is how they talk."""
