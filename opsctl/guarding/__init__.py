"""The thermal guard as an operator meets it: ``opsctl guard``, ``opsctl top``, ``opsctl drill thermal``.

``looking.py`` asks hosts, once or all the time; ``rows.py`` (tables) and ``explaining.py`` (sentences) are pure;
``ordering.py`` sends orders; ``replay.py`` (pure) and ``exercise.py`` are the drill. The guard itself is
``opsctl/agent/guard/``; docs/guard.md has both.
"""
