"""What differs on a host from what it is to have, and who changed it. ``differences.py`` is first.

``probe.py`` runs on the host and captures texts; ``history.py`` reads the logs of apt and dpkg, ``booting.py`` what the
next boot takes; ``differences.py`` judges, all three pure; ``hosts.py`` asks all hosts at once.
"""
