"""The Batch dock: a folder of images in, labels and measurements out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari.utils.notifications import show_error, show_info
from qtpy.QtCore import QUrl
from qtpy.QtGui import QDesktopServices
from qtpy.QtWidgets import QCheckBox, QFileDialog, QHBoxLayout, QPushButton

from napari_unet.batch.job import FILE_NAME, BatchJob
from napari_unet.batch.plan import REPORT, few
from napari_unet.errors import UnetError
from napari_unet.steps import describe_seconds
from napari_unet.widgets import _session
from napari_unet.widgets._batch_form import BatchForm
from napari_unet.widgets._batch_open import ResultOpener
from napari_unet.widgets._batch_run import look_steps, run_batch_steps
from napari_unet.widgets._batch_table import FileTable, Row
from napari_unet.widgets._dock import Dock, JobRow, while_alive
from napari_unet.widgets._worker import FollowUp, start_worker

if TYPE_CHECKING:
    from collections.abc import Generator

    import napari.viewer
    from napari.qt.threading import GeneratorWorker

    from napari_unet.batch.plan import Item
    from napari_unet.batch.run import BatchReport
    from napari_unet.batch.survey import Survey
    from napari_unet.steps import Progress
    from napari_unet.widgets._batch_run import BatchStep

NAME = "Batch"
RUN, RESUME = "Run batch", "Resume"
SURVEY_DELAY = 300  # ms after the last change


class BatchWidget(Dock):
    """Segment a folder of images, unattended.

    Parameters
    ----------
    viewer : napari.viewer.Viewer
        Gets the images and labels that are looked at.
    session : Session, optional
        The model shared with the other docks.
    """

    def __init__(
        self,
        viewer: napari.viewer.Viewer,
        session: _session.Session = _session.session,
    ):
        super().__init__()
        self._session = session
        self._worker: GeneratorWorker | None = None
        self._survey: Survey | None = None  # of what the fields say
        self._problem = ""  # why there is none
        self._job: BatchJob | None = None  # whose files are in the table
        self._items: dict[str, Item] = {}  # those files
        self._changes = self._looked = 0  # counts, to leave out what is outdated
        self._outcome = ""  # of the last run, until something changes
        self._is_stopped = False  # whether that was before its end
        self._opener = ResultOpener(self, viewer, self._say)
        self._looking = FollowUp(
            self, SURVEY_DELAY, self._look_steps, self._on_survey, self._on_problem
        )
        remembered = _session.recall(NAME)
        self._build(str(remembered.get("model", "nuclei")))
        self._restore(remembered)
        self._form.chooser.begin()
        self._on_change()

    # --- building -------------------------------------------------------------------

    def _build(self, wanted: str) -> None:
        self._form = BatchForm(self._session, wanted, self._on_change)
        self.column.addWidget(self._form)
        self._load = QPushButton("Load job…")
        self._load.setToolTip(f"Take everything from the {FILE_NAME} of a batch.")
        self._load.clicked.connect(lambda: self._browse_job())
        self._save = QPushButton("Save job…")
        self._save.setToolTip(
            "Write all this into a file, which repeats it here and on the command line."
        )
        self._save.clicked.connect(lambda: self._browse_save())
        self.column.addLayout(_row(self._load, self._save))
        self._replace = QCheckBox("Replace results")
        self._replace.setToolTip(
            "Make every image again, whatever lies in the folder of the results."
        )
        self._replace.toggled.connect(lambda _: self._refresh())
        self.column.addWidget(self._replace)
        self._row = JobRow(RUN, self._run, self._cancel)
        line = self._row.status.fontMetrics().lineSpacing()
        self._row.status.setMinimumHeight(3 * line + 2)  # so that the table stays
        self.column.addWidget(self._row)
        self._table = FileTable(self._open)
        self.column.addWidget(self._table, stretch=1)
        self._open_report = QPushButton("Open report")
        self._open_report.clicked.connect(lambda: self._show_outside(REPORT))
        self._open_folder = QPushButton("Open folder")
        self._open_folder.clicked.connect(lambda: self._show_outside(""))
        self.column.addLayout(_row(self._open_report, self._open_folder))

    # --- what can be done -------------------------------------------------------------

    def _on_change(self) -> None:
        """Something else is to be done: look what that means."""
        self._outcome = ""
        self._look()

    def _look(self) -> None:
        self._survey, self._problem = None, ""
        self._changes += 1
        try:
            self._form.job()
        except UnetError as error:
            self._problem = str(error)
        else:
            self._looking.request()
        self._refresh()

    def _look_steps(self) -> Generator[Progress, None, Survey] | None:
        model = self._session.model
        if self._worker is not None or self._problem or model is None:
            return None
        self._looked = self._changes
        return look_steps(self._form.job(), model)

    def _on_survey(self, survey: Survey) -> None:
        if self._worker is not None or self._looked != self._changes:
            return  # of what the fields said before
        self._survey, self._problem = survey, ""
        self._job = survey.job
        self._items = {file.item.name: file.item for file in survey.files}
        self._table.show_rows(
            Row(name, file.status, file.entry)
            for name, file in zip(self._items, survey.files, strict=True)
        )
        self._refresh()

    def _on_problem(self, message: str) -> None:
        if self._looked == self._changes:
            self._problem = f"⚠ {message}"
            self._items = {}
            self._table.show_rows([])
            self._refresh()

    def _refresh(self) -> None:
        """Show what can be done, and what cannot and why."""
        if self._worker is not None:
            return
        survey, model = self._survey, self._session.model
        lines = [] if model is None else [model.describe()]
        if survey is not None and model is not None:
            fit = model.describe_fit(survey.pixel_size)
            lines += [f"⚠ {text}" for text in (survey.doubt, fit) if text]
            self._form.objects.set_pixel_size(survey.pixel_size, model.ndim)
        self._form.about.setText("\n".join(lines))
        problem, words = self._judge()
        self._row.start.setText(RESUME if self._resumes else RUN)
        self._row.start.setEnabled(not problem)
        self._row.start.setToolTip(problem or words)
        shown = words or problem
        if self._outcome:
            more = f" {words}" if self._is_stopped else ""
            shown = f"{self._outcome}{more}"
        self._row.status.setText(shown)
        output = self._job.output if self._job is not None else None
        has_report = output is not None and (output / REPORT).is_file()
        self._open_report.setEnabled(has_report)
        self._open_report.setToolTip(
            "Pictures, counts, failures and settings, in the browser."
            if has_report
            else "There is none before the first run."
        )
        has_folder = output is not None and output.is_dir()
        self._open_folder.setEnabled(has_folder)
        self._open_folder.setToolTip(
            str(output) if has_folder else "It is made by the first run."
        )

    def _judge(self) -> tuple[str, str]:
        """Say why nothing can be run, or what will be."""
        survey = self._survey
        if survey is None:
            return self._problem or "Looking at the folders …", ""
        total, done = len(survey.files), survey.count("skipped")
        images = f"{total:,} image{'s' * (total != 1)}"
        if self._replace.isChecked():
            return "", f"{images}; results that exist are replaced."
        if tables := survey.foreign_tables:
            are = "is" if len(tables) == 1 else "are"
            return (
                f"⚠ {few([table.name for table in tables])} in that folder {are} not "
                "of these images. Choose another folder, or tick Replace results."
            ), ""
        if other := survey.count("other"):
            return (
                f"⚠ {other:,} result{'s' * (other != 1)} in that folder were made in "
                "another way, or changed since. Choose another folder, load the job "
                "that lies there, or tick Replace results."
            ), ""
        if done == total:
            all_done = f"All {images} are" if total > 1 else "The image is"
            return (
                f"{all_done} done. Choose other images or settings, or tick "
                "Replace results."
            ), ""
        failed, words = survey.count("failed"), f"{images}."
        if done and done + failed < total:
            words = f"{done:,} of {total:,} are done; Resume does the rest."
        elif done:
            them = "them" if failed > 1 else "it"
            words = f"{done:,} are done, {failed:,} failed; Resume tries {them} again."
        return "", words

    @property
    def _resumes(self) -> bool:
        survey = self._survey
        if survey is None or self._replace.isChecked():
            return False
        return 0 < survey.count("skipped") < len(survey.files)

    # --- running ----------------------------------------------------------------------

    def _run(self) -> None:
        survey, replace = self._survey, self._replace.isChecked()
        if survey is None or self._worker is not None or self._judge()[0]:
            return
        self._remember(survey.job)
        self._job = survey.job
        self._outcome, self._is_stopped = "", True
        self._set_running(True)
        self._worker = start_worker(
            run_batch_steps(
                survey.job, resume=survey.is_begun and not replace, overwrite=replace
            ),
            title="Batch",
            on_progress=self._on_step,
            on_result=self._on_report,
            on_error=self._on_error,
            on_finished=self._on_finished,
        )

    def _set_running(self, running: bool) -> None:
        self._row.set_running(running)
        for widget in self._form, self._load, self._save, self._replace:
            widget.setEnabled(not running)
        if running:
            self._row.cancel.setToolTip("Stop. What is finished is kept.")
            self._row.start.setEnabled(False)
            self._row.start.setToolTip("A batch is under way.")
            self._row.status.setText("Preparing …")

    def _cancel(self) -> None:
        if self._worker is not None:
            self._worker.quit()
            self._outcome = "Cancelled."
            self._row.cancel.setEnabled(False)
            self._row.status.setText("Stopping …")

    @while_alive
    def _on_step(self, step: BatchStep) -> None:
        if step.note:
            show_info(step.note)
        if step.is_plan:
            self._table.show_rows(step.changed.values())
        else:
            self._table.update_rows(step.changed)
        self._table.follow(step.current)
        if self._worker is not None and not self._worker.abort_requested:
            self._row.show_progress(step)

    @while_alive
    def _on_report(self, report: BatchReport) -> None:
        done = len(report.entries) - len(report.failed)
        counts = [
            entry.objects for entry in report.entries if entry.objects is not None
        ]
        parts = [f"{done:,} done"]
        if report.skipped:
            parts[0] += f" ({report.skipped:,} of them before)"
        if report.failed:
            parts.append(f"{len(report.failed):,} failed")
        if counts:
            parts.append(f"{sum(counts):,} object{'s' * (sum(counts) != 1)}")
        self._is_stopped = False
        took = describe_seconds(self._row.seconds)
        self._outcome = f"{', '.join(parts)} in {took}."

    @while_alive
    def _on_error(self, message: str) -> None:
        self._outcome, self._is_stopped = message, False  # it says how to go on

    def _on_finished(self) -> None:
        self._worker = None  # also if the dock has been closed
        self._after_run()

    @while_alive
    def _after_run(self) -> None:
        self._set_running(False)
        self._replace.setChecked(False)
        self._look()

    # --- results ----------------------------------------------------------------------

    def _open(self, row: Row) -> None:
        """Show the image of a double click, and its labels if there are any."""
        item, job = self._items.get(row.name), self._job
        if item is not None and job is not None:
            reason = row.entry.reason if row.entry is not None else ""
            self._opener.open(item.image, item.labels, job.axes, reason)

    def _say(self, words: str) -> None:
        if self._worker is None:
            self._outcome = words
            self._refresh()
        else:
            show_info(words)

    def _show_outside(self, name: str) -> None:
        if self._job is not None:
            place = self._job.output / name
            QDesktopServices.openUrl(QUrl.fromLocalFile(str(place)))

    # --- jobs -------------------------------------------------------------------------

    def load_job(self, path: Path) -> None:
        """Take everything from a job, as "Load job…" does."""
        try:
            self._form.show_job(BatchJob.load(path))
        except UnetError as error:
            show_error(str(error))

    def save_job(self, path: Path) -> None:
        """Write the job into a file, as "Save job…" does."""
        try:
            job = self._survey.job if self._survey is not None else self._form.job()
            job.save(path)
        except UnetError as error:
            show_error(str(error))

    def _browse_job(self) -> None:
        start = str(self._form.output.path or "")
        kinds = "Jobs (*.yaml *.yml);;All files (*)"
        path, _ = QFileDialog.getOpenFileName(self, "Load job", start, kinds)
        if path:
            self.load_job(Path(path))

    def _browse_save(self) -> None:
        folder = self._form.input.path
        start = str(folder.parent / FILE_NAME if folder is not None else FILE_NAME)
        path, _ = QFileDialog.getSaveFileName(self, "Save job", start, "Jobs (*.yaml)")
        if path:
            self.save_job(Path(path))

    # --- memory -----------------------------------------------------------------------

    def _remember(self, job: BatchJob) -> None:
        told = job.model_dump(mode="json", exclude={"model_sha256", "versions"})
        _session.remember(NAME, {"model": job.model, "job": told})

    def _restore(self, remembered: dict[str, Any]) -> None:
        try:
            job = BatchJob.of(remembered["job"])
        except (UnetError, KeyError):
            return  # the first start, or of another version
        model = self._session.source or job.model
        if model == job.model and model not in self._session.objects:
            self._form.show_job(job)
        else:  # what the other docks work with wins
            self._form.show_fields(job)


def _row(*buttons: QPushButton) -> QHBoxLayout:
    row = QHBoxLayout()
    for button in buttons:
        row.addWidget(button)
    return row
