"""The simulated GPUs of a lab: only the silicon is made up, everything above it is real.

Start at ``silicon.py``, the process outside the machines that owns each machine's shared state; ``plant.py`` is its
physics (pure), ``profiles.toml`` its data, ``layout.py`` the shared state, ``nvml/`` the library that machines load.
"""
