"""``opsctl upgrade-driver``: another driver on hosts that serve, wave by wave. ``verb.py`` is the one to read first."""
