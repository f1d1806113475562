"""The lab's vendor repository: a signed apt repository with packages of NVIDIA's names and relations.

Start at ``repository.py`` (builds it once); ``packages.toml`` is what is in it, ``catalogue.py`` reads that (pure),
``debs.py`` makes the files. ``programs/`` runs inside lab machines, ``parts/`` are maintainer scripts, units and texts.
"""
