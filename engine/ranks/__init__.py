"""Processes: how ranks start, talk, survive faults and end; hosts/ checks the machines before a run.

Read runtime.py and collectives.py first, then guard.py, watchdog.py and exit.py.
May import errors, config and records.
"""
