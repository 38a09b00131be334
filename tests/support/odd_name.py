"""A name that means something to a shell, a pattern, a format and an option parser."""

ODD_NAME = """run "a" 'b' ü $(touch X) `touch X`; touch X & | > X %s {0} #1 \\ ~"""
