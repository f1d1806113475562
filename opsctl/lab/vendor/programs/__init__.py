"""What the lab's driver packages bring: one file each, run by a machine's own python3, standard library only."""
