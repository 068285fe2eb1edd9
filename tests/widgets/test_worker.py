"""Steps in a thread arrive on the main thread one after the other."""

import time

from napari_unet.steps import Progress
from napari_unet.widgets._worker import start_worker


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

    start_worker(
        count_steps(),
        title="Counting",
        on_progress=look,
        on_result=results.append,
        on_error=results.append,
        on_finished=lambda: results.append("end"),
    )
    qtbot.waitUntil(lambda: "end" in results, timeout=15_000)
    assert results == ["all", "end"]
    assert seen == list(range(30))
