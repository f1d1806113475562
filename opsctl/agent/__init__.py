"""What runs on hosts: ``opsctl-host`` (``host.py``, open it first), ``opsctl-launch`` (``launch.py``), ``opsctl-agent``
(``supervisor.py``, the load balancer's voice), ``opsctl-setter`` (``setter/``, what needs root of the guard). Standard
library only but for what asks NVML or writes metrics, Python 3.10+; it travels as a wheel of its own with
``opsctl.errors`` and ``opsctl.serving``. ``manifest.py``, ``trust.py``, ``ledger.py`` are used by both sides.
"""
