from __future__ import annotations

import errno
import time
import warnings
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from batch_desk import BatchDesk, keep_model, write_images
from desk import Desk, intensity_model
from napari.utils.notifications import notification_manager
from qtpy.QtCore import QTimer
from qtpy.QtGui import QDesktopServices

from napari_unet.batch.folder import batch_steps
from napari_unet.batch.job import BatchJob
from napari_unet.batch.journal import Entry
from napari_unet.files.images import read_image
from napari_unet.inference.backends import Backend
from napari_unet.models.library import load_model
from napari_unet.steps import run_to_end
from napari_unet.widgets._batch_table import STATUS, FileTable, Row
from napari_unet.widgets._session import Session
from napari_unet.widgets.batch import BatchWidget


@pytest.fixture
def new_viewer(make_napari_viewer):
    def open_viewer(**options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of napari's own start
            return make_napari_viewer(**options)

    return open_viewer


@pytest.fixture
def on(new_viewer, qtbot):
    """A Batch dock with the model of bright pixels."""
    keep_model()
    return BatchDesk(new_viewer(), qtbot)


def files(folder):
    """What must be the same each time."""
    names = [*folder.glob("*.tif"), *folder.glob("*.csv")]
    return {path.name: path.read_bytes() for path in names}


def find_action(menu, text):
    for action in menu.actions():
        if action.menu() is not None:
            if (found := find_action(action.menu(), text)) is not None:
                return found
        elif action.text() == text:
            return action
    return None


def test_from_the_plugin_menu(new_viewer, qtbot):
    viewer = new_viewer()
    for menu in (viewer.window.plugins_menu, viewer.window.layers_menu):
        assert find_action(menu, "Batch (U-Net)") is not None
    find_action(viewer.window.plugins_menu, "Batch (U-Net)").trigger()
    (dock,) = viewer.window._qt_window.findChildren(BatchWidget)
    assert dock._row.start.text() == "Run batch"
    assert not dock._row.start.isEnabled()
    qtbot.waitUntil(lambda: "folder of the images" in dock._row.status.text())


def test_folder_with_a_bad_file(on, tmp_path):
    images = write_images(tmp_path / "in", 6, 2)
    on.choose(images)
    assert on.dock._form.output.path == tmp_path / "in-labels"
    assert on.status == "6 images."
    assert [row.status for row in on.rows] == ["waiting"] * 6
    on.dock._form._measure.setChecked(True)
    on.wait_for_look()
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    on.run()
    assert before == {path.name: path.read_bytes() for path in images.iterdir()}
    assert on.status.startswith("5 done, 1 failed, ")
    assert "objects in" in on.status
    statuses = [row.status for row in on.rows]
    assert statuses == ["skipped", "skipped", "failed", *["skipped"] * 3]
    assert on.rows[2].text(3).startswith("failed: is incomplete")
    assert on.rows[2].entry.reason in on.rows[2].tip
    assert on.rows[0].text(1) == "16"
    # What the dock has made is what the library makes of the same job.
    job = BatchJob.load(tmp_path / "in-labels" / "job.yaml")
    other = job.model_copy(update={"output": tmp_path / "other"})
    run_to_end(batch_steps(other))
    assert len(files(tmp_path / "other")) == 7
    assert files(tmp_path / "in-labels") == files(tmp_path / "other")


def test_report_and_folder_open(on, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(QDesktopServices, "openUrl", lambda url: opened.append(url))
    on.choose(write_images(tmp_path / "in", 2))
    assert not on.button("Open report").isEnabled()
    assert "no" in on.button("Open report").toolTip()
    on.run()
    on.button("Open report").click()
    on.button("Open folder").click()
    output = tmp_path / "in-labels"
    assert [url.toLocalFile().rstrip("/") for url in opened] == [
        str(output / "report.html"),
        str(output),
    ]
    assert (output / "report.html").is_file()


def test_cancel_and_resume(on, tmp_path):
    images = write_images(tmp_path / "in", 40, 1)
    on.choose(images)
    on.click_start()
    assert not on.start.isEnabled()
    on.wait_until(lambda: on.count("done") >= 3)
    on.button("Cancel").click()
    on.wait_for_end()
    done = on.count("skipped")
    assert 3 <= done < 39
    words = f"{done} of 40 are done; Resume does the rest."
    assert on.status == f"Cancelled. {words}"
    assert on.start.text() == "Resume"
    output = tmp_path / "in-labels"
    made = {path: path.stat().st_mtime_ns for path in output.glob("*.tif")}
    assert len(made) == done
    on.run()
    assert on.status.startswith(f"39 done ({done} of them before), 1 failed")
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    job = BatchJob.load(output / "job.yaml")
    run_to_end(batch_steps(job.model_copy(update={"output": tmp_path / "other"})))
    assert files(output) == files(tmp_path / "other")
    # The one that failed can be mended and tried again.
    good = images / "cells_0.tif"
    (images / "cells_1.tif").write_bytes(good.read_bytes())
    on.dock._on_change()
    on.wait_for_words("39 are done, 1 failed; Resume tries it again.")
    on.run()
    assert on.count("skipped") == 40
    assert "All 40 images are done" in on.start.toolTip()


def test_double_click_opens_once(on, tmp_path):
    on.choose(write_images(tmp_path / "in", 3, 1))
    on.run()
    on.double_click("cells_0.tif")
    on.double_click("cells_0.tif")  # while it is being read
    on.wait_until(lambda: len(on.viewer.layers) == 2)
    image, labels = on.viewer.layers
    np.testing.assert_allclose(image.scale, 0.5)
    np.testing.assert_allclose(labels.scale, 0.5)
    assert labels.data.max() == 16
    on.double_click("cells_2.tif")
    on.wait_until(lambda: len(on.viewer.layers) == 4)
    assert not image.visible
    assert not labels.visible
    on.double_click("cells_0.tif")
    assert len(on.viewer.layers) == 4
    assert labels.visible
    assert not on.viewer.layers[3].visible
    assert on.viewer.layers.selection.active is labels
    on.double_click("cells_1.tif")  # is damaged
    on.wait_until(lambda: on.rows[1].entry.reason in on.status)
    assert on.status.startswith("cells_1.tif ")
    assert len(on.viewer.layers) == 4
    on.viewer.layers.remove(image)
    on.viewer.layers.remove(labels)
    on.double_click("cells_0.tif")
    on.wait_until(lambda: len(on.viewer.layers) == 4)


def test_a_full_disk_says_what_is_done_and_how_to_go_on(on, tmp_path, monkeypatch):
    original, written = tifffile.TiffWriter.write, []

    def write(writer, *arguments, **options):
        written.append(writer)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "full")
        return original(writer, *arguments, **options)

    on.choose(write_images(tmp_path / "in", 5))
    with monkeypatch.context() as patch:
        patch.setattr(tifffile.TiffWriter, "write", write)
        on.run()
    assert "the disk is full" in on.status
    words = "2 of 5 images are done and kept; resume the batch (--resume) for the rest."
    assert on.status.endswith(words)
    assert on.start.text() == "Resume"
    on.run()
    assert on.status.startswith("5 done (2 of them before), ")


def test_opened_labels_follow_a_new_run(on, tmp_path):
    on.choose(write_images(tmp_path / "in", 1))
    on.run()
    on.double_click("cells_0.tif")
    on.wait_until(lambda: len(on.viewer.layers) == 2)
    labels = on.viewer.layers[1]
    on.dock._form.objects._smallest.setValue(100)  # more than the spots have
    on.wait_for_words("another way")
    assert not on.start.isEnabled()
    on.dock._replace.setChecked(True)
    on.run()
    on.double_click("cells_0.tif")
    on.wait_until(lambda: labels.data.max() == 0)
    assert len(on.viewer.layers) == 2


def test_failed_only_for_the_model_opens_its_image(on, tmp_path):
    images = write_images(tmp_path / "in", 2)
    tifffile.imwrite(
        images / "channels.tif",
        np.zeros((2, 32, 32), np.uint8),
        imagej=True,
        metadata={"axes": "CYX"},
    )
    on.choose(images)
    on.run()
    failed = [row for row in on.rows if row.status == "failed"]
    assert [row.name for row in failed] == ["channels.tif"]
    on.double_click("channels.tif")
    on.wait_until(lambda: len(on.viewer.layers) == 2)  # one for each channel
    on.wait_for_words("2 channels")


def test_refusals_in_words(on, tmp_path):
    images = write_images(tmp_path / "in", 2)
    form = on.dock._form
    for folder, results, words in [
        (tmp_path / "nothing", tmp_path / "out", "nothing"),
        (tmp_path, tmp_path / "out", "There are no images"),
        (images, images, "same folder"),
        (images, images / "cells_0.tif", "not a folder"),
    ]:
        on.choose(folder, results)
        on.wait_for_words(words)
        assert not on.start.isEnabled()
        assert words in on.start.toolTip()
    on.choose(images, images / "out")
    on.wait_for_words("2 images.")
    form._recursive.setChecked(True)
    on.wait_for_words("inside the folder of the images")
    assert not on.start.isEnabled()
    form._recursive.setChecked(False)
    form._pixel_size.value = "zero"
    on.wait_for_words("is not a pixel size")
    form._pixel_size.value = ""
    form._channels.value = "0"
    on.wait_for_words("are no channels")
    form._channels.value = ""
    form._pattern.setText("*_1*")
    on.wait_for_words("1 image.")


def test_existing_results_are_replaced_on_request_only(on, tmp_path):
    images = write_images(tmp_path / "in", 3)
    output = tmp_path / "in-labels"
    output.mkdir()
    (output / "cells_1.tif").write_bytes(b"painted by hand")
    on.choose(images)
    assert "1 result in that folder" in on.status
    assert not on.start.isEnabled()
    on.dock._replace.setChecked(True)
    assert on.start.isEnabled()
    on.run()
    assert read_image(output / "cells_1.tif").data.max() == 16
    assert not on.dock._replace.isChecked()
    # Labels that were corrected by hand are not lost either.
    labels = read_image(output / "cells_2.tif").data
    tifffile.imwrite(output / "cells_2.tif", np.zeros_like(labels))
    on.dock._on_change()
    on.wait_for_words("changed since")
    assert not on.start.isEnabled()


def test_jobs_are_saved_and_loaded(on, tmp_path, new_viewer, qtbot):
    images = write_images(tmp_path / "in", 2)
    form = on.dock._form
    on.choose(images, tmp_path / "out")
    form._pattern.setText("cells*")
    form.objects._threshold.setValue(0.7)
    form._axes.value = "YX"
    form._pixel_size.value = "0.25, 0.5"
    form._channels.value = "1"
    form._tile.value = 64
    form._memory_limit.value = 1.5
    form._measure.setChecked(True)
    form._format.setCurrentIndex(1)
    on.wait_for_look()
    on.dock.save_job(tmp_path / "mine.yaml")
    saved = BatchJob.load(tmp_path / "mine.yaml")
    assert saved.settings.threshold == 0.7
    assert saved.settings.minimal_size is None  # as the model recommends
    assert saved.settings.channels == (0,)
    assert saved.settings.memory_limit == 1.5
    assert saved.pixel_size == {"Y": 0.25, "X": 0.5}
    assert saved.model_sha256
    keep_model("dim", threshold=0.2)
    second = BatchDesk(on.viewer, qtbot, Session(load_model("dim"), "dim"))
    second.dock.load_job(tmp_path / "mine.yaml")
    second.wait_until(lambda: second.session.source == "bright")
    second.wait_for_look()
    assert second.dock._survey.job == saved


def test_the_settings_of_the_command_line_are_kept(on, tmp_path):
    """What it has begun can be resumed here."""
    images = write_images(tmp_path / "in", 3)
    told = {"threshold": 0.61234, "minimal_size": 5000}
    job = BatchJob.of(
        {
            "input": images,
            "output": tmp_path / "out",
            "model": "bright",
            "settings": told,
        }
    )
    steps = batch_steps(job)
    with closing(steps):
        while next(steps).status != "done":
            pass
    on.dock.load_job(tmp_path / "out" / "job.yaml")
    on.wait_for_words("of 3 are done; Resume does the rest.")


def test_a_job_that_is_loaded_while_another_model_is(on, tmp_path):
    on.dock._form.objects._threshold.setValue(0.7)
    on.choose(write_images(tmp_path / "in", 2), tmp_path / "out")
    on.dock.save_job(tmp_path / "mine.yaml")
    keep_model("dim", threshold=0.2)
    model = on.session.model
    on.dock._form.chooser.open_checkpoint("dim")
    on.dock.load_job(tmp_path / "mine.yaml")
    on.wait_until(lambda: on.session.model is not model)
    on.wait_until(lambda: on.session.source == "bright")
    on.wait_for_words("2 images.")
    assert on.dock._survey.job.settings.threshold == 0.7


def test_another_model_of_the_same_name_is_refused(on, tmp_path):
    on.choose(write_images(tmp_path / "in", 2), tmp_path / "out")
    on.dock.save_job(tmp_path / "mine.yaml")
    keep_model("bright", threshold=0.2)
    on.dock._form.chooser.open_checkpoint("bright")
    model = on.session.model
    on.wait_until(lambda: on.session.model is not model)
    on.dock.load_job(tmp_path / "mine.yaml")
    on.wait_for_words("is not the one that the job was made with")
    assert not on.start.isEnabled()
    on.dock._form.chooser.open_checkpoint("bright")  # this one is wanted
    on.wait_for_words("2 images.")


def test_damaged_job(on, tmp_path):
    (tmp_path / "job.yaml").write_text("nothing: here")
    on.dock.load_job(tmp_path / "job.yaml")
    notes = [str(note.message) for note in notification_manager.records]
    assert any("not a batch job" in note for note in notes)


def test_objects_follow_the_segment_dock(on, tmp_path, qtbot):
    segment = Desk(on.viewer, qtbot, on.session)
    segment.dock._objects._threshold.setValue(0.8)
    on.choose(write_images(tmp_path / "in", 1))
    assert on.dock._survey.job.settings.threshold == 0.8
    third = BatchDesk(on.viewer, qtbot, on.session)
    assert third.dock._form.objects.values()["threshold"] == 0.8


def test_remembered(on, tmp_path, new_viewer, qtbot):
    on.choose(write_images(tmp_path / "in", 2), tmp_path / "out")
    on.dock._form._measure.setChecked(True)
    on.dock._form.objects._threshold.setValue(0.7)
    on.wait_for_look()
    on.run()
    later = BatchDesk(on.viewer, qtbot, Session())
    later.wait_for_look()
    later.wait_for_words("All 2 images are done")
    form = later.dock._form
    assert form.output.path == tmp_path / "out"
    assert form._measure.isChecked()
    assert form.objects.values()["threshold"] == 0.7


def test_the_model_of_the_other_docks_wins_over_a_remembered_one(on, tmp_path):
    on.choose(write_images(tmp_path / "in", 1))
    on.run()
    keep_model("dim", threshold=0.2)
    later = BatchDesk(on.viewer, on.qtbot, Session(load_model("dim"), "dim"))
    later.wait_for_words("another way")
    assert later.session.source == "dim"


def test_notes_are_told_once_and_kept_with_their_files(on, tmp_path):
    images = write_images(tmp_path / "in", 1)
    for name in "ab":
        pages, path = np.zeros((3, 32, 32), np.uint8), images / f"{name}.tif"
        tifffile.imwrite(path, pages, metadata=None, photometric="minisblack")
    on.choose(images)
    on.run()

    def check(desk):
        noted = [row for row in desk.rows if row.text(3) == "done, note"]
        assert [row.name for row in noted] == ["a.tif", "b.tif"]
        for row in noted:
            assert f"{row.name} does not name all its axes" in row.tip

    check(on)
    # Also after the viewer was closed.
    later = BatchDesk(on.viewer, on.qtbot, Session())
    later.wait_for_words("All 3 images are done")
    check(later)
    told = [note for note in notification_manager.records if "axes" in note.message]
    assert len(told) == 1


def test_a_note_says_of_which_file_it_is(on, tmp_path):
    images = write_images(tmp_path / "in", 1)
    image = np.zeros((32, 32), np.float32)
    image[0, :2] = np.nan
    tifffile.imwrite(images / "d.tif", image)
    on.choose(images)
    on.run()
    told = [note.message for note in notification_manager.records]
    assert "d.tif: 2 pixels are NaN or infinite; they are background." in told


def test_what_becomes_of_a_file_can_be_read_in_a_narrow_dock(qtbot):
    table = FileTable(lambda _: None)
    qtbot.addWidget(table)
    table.resize(280, 200)
    table.show()
    table.show_rows([Row("cells.tif", "done")])
    words = table.fontMetrics().horizontalAdvance("done, note")
    qtbot.waitUntil(lambda: table.columnWidth(STATUS) > words)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("a.tif is no image.", "is no image."),
        ("a.tif: The axes differ.", "The axes differ."),
        ("a.tif, page 3, is damaged.", "a.tif, page 3, is damaged."),
        ("a.tiff is another one.", "a.tiff is another one."),
    ],
)
def test_the_table_says_a_name_once(reason, words):
    row = Row("sub/a.tif", "failed", Entry("sub/a.tif", "failed", reason=reason))
    assert row.text(STATUS) == f"failed: {words}"


def test_tables_of_other_images_are_replaced_on_request_only(on, tmp_path):
    images = write_images(tmp_path / "in", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.csv").write_text("mine")
    on.choose(images, tmp_path / "out")
    assert [row.status for row in on.rows] == ["waiting"] * 2
    assert on.status.startswith("⚠ summary.csv in that folder is not of these images.")
    assert not on.start.isEnabled()
    on.dock._replace.setChecked(True)
    on.run()
    assert on.status.startswith("2 done")


def test_a_memory_limit_that_is_too_low_is_said_before(on, tmp_path, monkeypatch):
    monkeypatch.setattr(Backend, "_fixed_bytes", 10**9)
    on.dock._form._memory_limit.value = 0.5
    on.choose(write_images(tmp_path / "in", 2))
    assert "⚠ A memory limit of 0.5 GB is too low" in on.dock._form.about.text()
    on.run()
    assert on.status.startswith("A memory limit of 0.5 GB is too low")


def test_a_model_without_a_file(new_viewer, qtbot, tmp_path):
    on = BatchDesk(new_viewer(), qtbot, Session(intensity_model()))
    on.choose(write_images(tmp_path / "in", 1))
    on.wait_for_words("The model has no file")
    assert not on.start.isEnabled()


def test_second_run_on_one_folder_is_refused(on, tmp_path):
    on.choose(write_images(tmp_path / "in", 3))
    job = on.dock._survey.job
    steps = batch_steps(job)
    with closing(steps):
        next(steps)
        on.click_start()
        on.wait_until(lambda: on.dock._worker is None)
        assert "Another batch is writing" in on.status


def test_thousands_of_files_do_not_stop_the_viewer(on, tmp_path):
    folder = tmp_path / "in"
    write_images(folder, 1)
    content = (folder / "cells_0.tif").read_bytes()
    for number in range(2000):
        (folder / f"cells_{number}.tif").write_bytes(content)
    gaps, last = [], [time.perf_counter()]

    def tick():
        now = time.perf_counter()
        gaps.append(now - last[0])
        last[0] = now

    timer = QTimer()
    timer.timeout.connect(tick)
    timer.start(5)
    on.choose(folder)
    assert on.status == "2,000 images."
    on.qtbot.wait(50)
    timer.stop()
    assert len(on.rows) == 2000
    assert max(gaps) < 0.2


def test_running_file_stays_in_sight_unless_scrolled(on):
    from napari_unet.widgets._batch_table import FileTable, Row

    table = FileTable(lambda row: None)
    on.qtbot.addWidget(table)
    table.resize(320, 200)
    table.show()
    rows = [Row(f"experiment_{n}.tif", "waiting") for n in range(10_000)]
    table.show_rows(rows)
    assert table.model().index(7, 0).data() == "…7.tif"  # what differs is seen

    def is_seen(number):
        return table._is_seen(table._rows.shown_at(rows[number].name))

    for number in range(100, 300, 7):  # as when a batch is resumed
        table.update_rows({rows[number].name: replace(rows[number], status="running")})
        table.follow(rows[number].name)
        assert is_seen(number)
    table.verticalScrollBar().setValue(5000)
    table.follow(rows[301].name)
    assert not is_seen(301)
    table.verticalScrollBar().setValue(300)
    table.follow(rows[400].name)
    assert is_seen(400)
    # Sorted by status, those that run are the first.
    table.sortByColumn(3, table.horizontalHeader().sortIndicatorOrder().AscendingOrder)
    assert table._rows.at(0).status == "running"
    table.update_rows({rows[9999].name: replace(rows[9999], status="failed")})
    assert table.model().index(table._rows.shown_at(rows[9999].name), 3).data() == (
        "failed"
    )
