"""Prints ``stale`` when a file is newer than the last start or reload of a unit, else ``fresh``: UNIT FILE..."""

import datetime
import os
import subprocess
import sys

unit, files = sys.argv[1], sys.argv[2:]
# A reload is a change of state too: reloading -> active.
shown = subprocess.run(["systemctl", "show", unit, "--property=StateChangeTimestamp", "--value", "--timestamp=us+utc"],
                       stdout=subprocess.PIPE, check=True, universal_newlines=True).stdout.strip()
if shown:
    changed = datetime.datetime.strptime(shown, "%a %Y-%m-%d %H:%M:%S.%f UTC").replace(tzinfo=datetime.timezone.utc)
    newest = max((os.stat(path).st_mtime for path in files if os.path.exists(path)), default=0.0)
    print("stale" if newest > changed.timestamp() else "fresh")
else:
    print("fresh")  # never started: it has no old files in its head
