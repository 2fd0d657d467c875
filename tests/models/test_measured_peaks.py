"""What was measured of a model stands in for the estimate at its next start."""

import logging

import pytest

from photogram.core.config import ServeConfig
from photogram.core.worker_config import Placement
from photogram.models.checkpoint import find_checkpoint
from photogram.models.measured_peaks import MeasuredPeaks, Peak, PeakRecord

from .test_memory_plan import GB, chosen, make_flux, plan

RESIDENT = Placement().settled()
USUAL = (1024, 1024, None)


def peaks_of(folder, **flags) -> MeasuredPeaks:
    config = ServeConfig(model_path=str(folder), data_dir=str(folder), **flags).worker(folder)
    return MeasuredPeaks(find_checkpoint(str(folder), revision=None, variant=None), config, "bf16")


def measure(folder, *, work_gb: float, placement=RESIDENT, phases=("denoise", "decode"), **flags) -> None:
    """Note calls of a start in which every phase's weights were those of the plan, and took so much beside them."""
    weights = plan(folder, 80, **flags).plan.weights
    record = PeakRecord(peaks_of(folder, **flags), placement, weights)
    for phase in phases:
        record.note(phase, USUAL, weights[phase] + int(work_gb * GB))


def test_what_took_more_than_estimated_is_made_room_for_at_the_next_start(tmp_path):
    folder = make_flux(tmp_path)
    assert chosen(plan(folder, 48)) == set()
    measure(folder, work_gb=12)
    assert chosen(plan(folder, 48)) != set()
    assert chosen(plan(folder, 80)) == set()


def test_what_took_less_than_estimated_fits_where_it_did_not(tmp_path):
    folder = make_flux(tmp_path)
    assert chosen(plan(folder, 39)) != set()
    measure(folder, work_gb=0.5)
    assert chosen(plan(folder, 39)) == set()


def test_a_measurement_counts_for_its_placement_and_its_way_of_running_alone(tmp_path):
    folder = make_flux(tmp_path)
    measure(folder, work_gb=30, placement=Placement(vae_tiling=True).settled())
    measure(folder, work_gb=30, vae_precision="fp32")
    assert chosen(plan(folder, 48)) == set()


def test_the_report_shows_what_was_measured_beside_the_estimate(tmp_path):
    folder = make_flux(tmp_path)
    assert not any(line.startswith("measured") for line in plan(folder, 80).plan.reasons)
    measure(folder, work_gb=2.5, phases=("denoise",))
    (line,) = (line for line in plan(folder, 80).plan.reasons if line.startswith("measured"))
    weights = plan(folder, 80).plan.weights["denoise"] / GB
    assert f"{weights + 2.5:.1f} GB to denoise at 1024x1024, estimated" in line


@pytest.mark.parametrize(
    ("width", "num_bytes", "is_kept"),
    [(512, 900, False), (1024, 900, False), (1024, 1001, False), (1024, 1200, True), (2048, 900, True)],
)
def test_the_largest_request_is_kept_and_of_its_size_the_highest_peak(width, num_bytes, is_kept, tmp_path):
    folder = make_flux(tmp_path)
    first = Peak(width=1024, height=1024, frames=None, num_bytes=1000)
    second = Peak(width=width, height=1024, frames=None, num_bytes=num_bytes)
    for peak in (first, second):
        peaks_of(folder).keep(RESIDENT, "decode", peak)
    assert peaks_of(folder).under(RESIDENT) == {"decode": second if is_kept else first}


def test_another_size_is_planned_in_proportion(tmp_path):
    folder = make_flux(tmp_path)
    (folder / "photogram.json").write_text('{"default_width": 2048, "default_height": 1024}')
    measure(folder, work_gb=3, phases=("denoise",))
    found = plan(folder, 80).plan
    work = found.peaks["denoise"] - found.weights["denoise"]
    assert work == pytest.approx(0.5 * GB + 1.1 * 2 * 3 * GB, rel=1e-6)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"resident": {"denoise": {"width": "wide"}}}',
        b'{"resident": {"rest": {"width": 8, "height": 8, "frames": null, "num_bytes": 8}}}',
    ],
)
def test_a_file_that_cannot_be_read_is_as_none_and_is_written_anew(content, tmp_path, caplog):
    folder = make_flux(tmp_path)
    measure(folder, work_gb=12)
    (file,) = (folder / "memory").iterdir()
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert chosen(plan(folder, 48)) == set()
    assert "cannot be read" in caplog.text
    measure(folder, work_gb=12)
    assert chosen(plan(folder, 48)) != set()


def test_a_folder_that_cannot_be_written_costs_a_line_in_the_log(tmp_path, caplog):
    folder = make_flux(tmp_path)
    (folder / "memory").write_text("in the way")
    measure(folder, work_gb=12)
    assert "not kept" in caplog.text
