"""What a computation tells on its way, and what it returns."""


def collect(steps):
    """Go through a generator; return all that it yields, and its result."""
    found = []
    while True:
        try:
            found.append(next(steps))
        except StopIteration as stop:
            return found, stop.value


def notes_of(steps):
    """Go through a generator; return its notes and its result."""
    ticks, result = collect(steps)
    return [tick.note for tick in ticks if tick.note], result
