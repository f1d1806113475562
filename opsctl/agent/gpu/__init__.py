"""GPUs as the agent sees them. ``series.py`` lists what is exported; ``exporter.py`` holds the parts together.

In a process of its own, because a call of NVML may hang and cannot be cancelled: ``child.py`` with ``nvml.py`` (how it
is asked), ``sample.py`` (one GPU's values) and ``gpm.py``. It writes one JSON object a line. In the agent:
``reader.py`` (starts, watches and replaces it), ``kernel_log.py``, ``xids.py``, ``verdict.py`` (what all that means),
``metrics.py`` and ``web.py`` (how Prometheus gets it), ``told.py`` (how ``opsctl-host state`` gets it).
"""
