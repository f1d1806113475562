"""The lab: a fleet of real systemd machines on this computer. Nothing in the product knows whether it runs here.

``laboratory.py`` is the one to read first: what each verb does, in order. It is built from
``requirements`` (what must be there), ``base`` (the Debian root, built once), ``subnets`` and ``network`` (one bridge
a lab), ``layers`` (a machine's disk, which can lose power), ``machines`` (prepare, boot, stop, cut), ``fleet_files``
(what an operator gets) and ``state`` (what the next command finds).
"""
