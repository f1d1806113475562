"""opsctl: guarded, monitored LLM servers on bare GPU machines.

Start reading in ``cli/`` (one file per verb), then ``provisioning.py`` (what a provision does, in order), ``fleet/``
(what an inventory means) and ``docs/``.
"""

__version__ = "0.1.0"
