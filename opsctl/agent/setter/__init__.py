"""The only part with root that the guard needs: it sets clocks and power limits, stops and starts instances, and
restores what it set. Begin at ``protocol.py``, the fixed list of what it may be asked; ``server.py`` hears it.
"""
