"""launch/check_hosts.py: whether the hosts of a hostfile can train together.

Read check.py first; agent.py is sent to the hosts as source and imports nothing of ours.
May import errors, config and records.
"""
