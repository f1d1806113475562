"""Journals of many hosts as one: ``entries.py`` decides and is pure, ``reading.py`` asks the hosts and follows them."""
