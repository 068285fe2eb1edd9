"""Steps in a thread arrive on the main thread one after the other."""

import threading
import time

from napari_unet.steps import Progress
from napari_unet.widgets._worker import start_worker


def start(steps, on_progress, results):
    """Start a worker whose results are listed, and its end."""
    return start_worker(
        steps,
        title="Counting",
        on_progress=on_progress,
        on_result=results.append,
        on_error=results.append,
        on_finished=lambda: results.append("end"),
    )


def test_steps_arrive_in_order(make_napari_viewer, qtbot):
    make_napari_viewer()  # whose activity dock runs the event loop at each update
    seen, results = [], []

    def count_steps():
        for number in range(30):
            yield Progress(number, 30)
        return "all"

    def look(step):
        time.sleep(0.02)  # meanwhile others queue up
        seen.append(step.done)

    start(count_steps(), look, results)
    qtbot.waitUntil(lambda: "end" in results, timeout=15_000)
    assert results == ["all", "end"]
    assert seen == list(range(30))


def test_who_cancels_at_the_end_gets_nothing(make_napari_viewer, qtbot):
    make_napari_viewer()
    results, ended = [], threading.Event()

    def short_steps():
        yield Progress(0, 1)
        ended.set()
        return "all"

    def cancel_late(step):
        ended.wait()
        time.sleep(0.2)  # until the result waits for this thread
        worker.quit()

    worker = start(short_steps(), cancel_late, results)
    qtbot.waitUntil(lambda: "end" in results, timeout=15_000)
    assert results == ["end"]
