"""The thermal guard: from temperatures to an instance's traffic, clocks and, at last, its stop.

``model.py`` has the words. Pure: ``readings.py`` (a sample to readings), ``trend.py`` (slope, time to slowdown),
``decide.py`` (which rung, and why), ``pool.py`` (may one instance stop). ``keeper.py`` looks, decides and acts, in the
agent. Clocks and units are moved by ``opsctl/agent/setter/``, a process of its own and the only one with root.
"""
