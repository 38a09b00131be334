"""Exit codes of every command: 0 done, 1 crash, 2 bad configuration or input, 3 diverged, 4 stopped by a signal with
everything kept that the same command needs to continue."""

EXIT_DONE, EXIT_CRASH, EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_PREEMPTED = range(5)
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells count it
