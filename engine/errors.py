"""What ends a job: the errors whose text is for the user, and the exit codes of every script. No torch here."""


class UserError(ValueError):
    """Bad configuration or input; exit code 2. The message names the key, file or line, the value, and the remedy."""


class RunFailure(RuntimeError):
    """Something around a running job failed (a disk, a device's memory); exit code 1. The message says what is kept,
    and what to do."""


class Diverged(RunFailure):
    """Losses or weights were not finite, and nothing could go on with them; exit code 3. The records say where."""


class Preempted(KeyboardInterrupt):
    """A job was told to stop (Ctrl-C, SIGTERM, SIGUSR1), and has saved what it has; exit code 4. The same call
    continues. No `Exception`: what runs several jobs is to stop, too."""


EXIT_DONE, EXIT_CRASH, EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_PREEMPTED = range(5)
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells count it
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""Parts of what PyTorch says where memory runs out."""


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says, with the next where it ends in a colon; its type where it says
    nothing."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first.rstrip()} {others[0].strip()}" if others and first.rstrip().endswith(":") else first


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether memory ran out, of a GPU or of the machine: for a CPU, PyTorch has no class of its own."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)
