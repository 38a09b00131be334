"""The report of a search: text, leaderboard, plots, the winner's confirmation and its configuration.

Read write.py first, then text.py, whose sections are in search_sections.py and confirmation_sections.py, and plots.py.
May import of ga/ everything but loop, dry_run, search and cli.
"""
