"""What runs on hosts: ``opsctl-host`` (``host.py``, open it first), ``opsctl-launch`` (``launch.py``), ``opsctl-agent``
(``supervisor.py``, the load balancer's voice). Standard library only, Python 3.10+; it travels as a wheel of its own
with ``opsctl.errors`` and ``opsctl.serving``. ``manifest.py``, ``trust.py``, ``ledger.py`` are used by both sides.
"""
