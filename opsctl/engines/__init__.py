"""The engines a verb drives (Ansible as a process, Fabric sessions) and the one stream of events they all speak.

Open ``events.py`` first.
"""
