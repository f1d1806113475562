"""Releases on the operator's side: import and sign (``importing.py``, open it first), the bundle's store, publishing to
the gateway, the first start of a fleet. What hosts need too (manifest, signature check, ledger) is in ``opsctl.agent``.
"""
