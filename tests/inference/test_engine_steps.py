"""The generator protocol, running out of memory, and the choice of a device."""

import copy
import itertools
import re
import threading
import time

import numpy as np
import pytest
import torch
from exact import Predictor, predict, predict_steps, segment, segment_steps
from ticks import collect
from whole_image import random_image, reference, trained_model

from napari_unet.errors import BadInput, Cancelled, OutOfMemory
from napari_unet.inference import backends, engine, executors, tile_run
from napari_unet.inference.backends import Backend, Device, choose_device
from napari_unet.inference.source import Source
from napari_unet.inference.transfers import Transfers
from napari_unet.models.model import Model
from napari_unet.models.normalize import Normalization
from napari_unet.network.unet import UNet
from napari_unet.steps import Progress, run_to_end


@pytest.fixture(autouse=True)
def by_torch(monkeypatch):
    """Let torch run the networks, because the tests reach into them."""
    monkeypatch.setattr(executors, "can_execute", lambda config: False)


@pytest.fixture(params=[1, 3])
def in_flight(request, monkeypatch):
    """How many tiles are computed at a time: several on a GPU."""
    monkeypatch.setattr(Transfers, "in_flight", request.param)
    return request.param


def check_ticks(ticks: list[Progress]) -> None:
    """Determinate, monotone, and complete at the end."""
    assert all(isinstance(tick, Progress) for tick in ticks)
    assert all(0 <= tick.done <= tick.total for tick in ticks)
    for earlier, later in itertools.pairwise(ticks):
        assert earlier.done <= later.done
        assert earlier.total <= later.total
    assert ticks[-1].done == ticks[-1].total
    notes = [tick.note for tick in ticks if tick.note]
    assert len(notes) == len(set(notes))
    for tick in ticks:
        number, total = tick.message.removeprefix("tile ").split(" of ")
        assert 1 <= int(number) <= int(total) == tick.total


# --- progress ----------------------------------------------------------------


@pytest.mark.parametrize("axes", ["YX", "ZYX"])
@pytest.mark.parametrize("steps", [predict_steps, segment_steps])
def test_progress_counts_tiles(axes, steps, model):
    image = random_image((1, 3, 40, 33))[0][(0,) * (3 - len(axes))]
    ticks, result = collect(steps(image, model, axes=axes, tile_shape=(16, 16)))
    check_ticks(ticks)
    tiles = 9 * (3 if axes == "ZYX" else 1)
    assert {tick.total for tick in ticks} == {tiles}
    assert {tick.done for tick in ticks} >= set(range(1, tiles + 1))
    blocking = predict if steps is predict_steps else segment
    np.testing.assert_array_equal(
        result, blocking(image, model, axes=axes, tile_shape=(16, 16))
    )


def test_progress_while_rescaling(image):
    model = trained_model()
    passport = model.passport.model_copy(update={"pixel_size": (0.5, 0.5)})
    steps = predict_steps(
        image,
        Model(model.network, passport),
        tile_shape=(16, 16),
        pixel_size={"Y": 0.3, "X": 0.3},
    )
    ticks, _ = collect(steps)
    check_ticks(ticks)
    assert [tick.note for tick in ticks if tick.note] == [
        "Your pixels are 0.3 µm, the model was trained at 0.5 µm: rescaling by 0.60."
    ]


def test_run_to_end_returns_the_result():
    def steps():
        yield 1
        yield 2
        return "result"

    assert run_to_end(steps()) == "result"


def slow_model(seconds: float, **options) -> Model:
    """Every convolution waits before it starts."""
    network = copy.deepcopy(trained_model(**options).network)
    with torch.no_grad():
        network.head.bias += seconds  # not the weights of a model that was used before
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return Model(network)


def test_a_long_tile_has_heartbeats(monkeypatch, image):
    steps = predict_steps(image, slow_model(0.15))  # 13 convolutions in one tile
    times, ticks = [time.monotonic()], []
    for tick in steps:
        times.append(time.monotonic())
        ticks.append(tick)
    assert times[-1] - times[0] > 1
    assert np.diff(times).max() < 0.5
    assert len(ticks) > 4
    assert {tick.done for tick in ticks[:-1]} == {0}
    check_ticks(ticks)


def engine_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("napari-unet")]


@pytest.mark.parametrize("steps", [predict_steps, segment_steps])
@pytest.mark.parametrize("augment", [False, True])
def test_closing_ends_the_computation_within_a_second(steps, augment, image, in_flight):
    running = steps(image, slow_model(0.2), test_time_augmentation=augment)
    for _ in range(3):
        assert next(running).done == 0
    assert engine_threads()
    start = time.monotonic()
    running.close()
    assert time.monotonic() - start < 0.2
    for thread in engine_threads():
        thread.join(timeout=1)
    assert not engine_threads()
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("axes", ["YX", "ZYX", "YZX"])
def test_several_tiles_at_a_time_change_nothing(monkeypatch, model, axes):
    image = random_image((1, 3, 90, 70))[0]
    image = image[0] if axes == "YX" else np.moveaxis(image, 0, axes.index("Z"))
    options = {"axes": axes, "tile_shape": (16, 32)}
    one, objects = predict(image, model, **options), segment(image, model, **options)
    monkeypatch.setattr(Transfers, "in_flight", 3)
    ticks, several = collect(predict_steps(image, model, **options))
    np.testing.assert_array_equal(several, one)
    np.testing.assert_array_equal(segment(image, model, **options), objects)
    check_ticks(ticks)


def test_the_next_plane_is_read_meanwhile():
    """And none is read twice, or too early."""
    image, events = random_image((1, 3, 60, 50))[0], []

    class Watched:
        shape, ndim, dtype = image.shape, image.ndim, image.dtype

        def __getitem__(self, index):
            if isinstance(index[0], int):
                events.append(("read", index[0]))
            return image[index]

    model = trained_model(Normalization(scope="plane"))
    predictor = Predictor(Watched(), model, axes="TYX")
    for plane in range(3):
        run_to_end(predictor.unit_steps(plane))
        events.append(("predicted", plane))
    predictor.close()
    order = [event for event in events if event[0] == "read"]
    assert order == [("read", plane) for plane in range(3)]
    assert events.index(("read", 1)) < events.index(("predicted", 0))
    assert events.index(("predicted", 0)) < events.index(("read", 2))


def test_closing_at_every_tick(model, in_flight):
    image = random_image((1, 2, 40, 33))[0]
    for count in range(9):
        steps = predict_steps(image, model, axes="ZYX", tile_shape=(32, 32))
        for _ in range(count):
            next(steps)
        steps.close()


def test_a_tile_that_ends_just_after_the_heartbeat(monkeypatch, image, model):
    """Whatever the timing, a tick is a tick and never an error."""
    monkeypatch.setattr(tile_run, "HEARTBEAT", 1e-5)
    wanted = reference(model, image[None])
    for _ in range(3):
        ticks, result = collect(predict_steps(image, model, tile_shape=(8, 8)))
        check_ticks(ticks)
        np.testing.assert_allclose(result, wanted, atol=1e-4)


def test_parts_make_up_the_whole(model):
    """They share the statistics of the image, and what was said."""
    image = random_image((1, 60, 70))[0].astype(np.float32)
    image[:30] += 1e4
    image[2, 2] = image[50, 50] = np.nan
    whole = predict(image, model)
    predictor = Predictor(image, model)
    try:
        for rows in (slice(0, 24), slice(24, 60)):
            part = predictor.within({"Y": rows})
            assert part.output_shape == (2, rows.stop - rows.start, 70)
            ticks, result = collect(part.unit_steps(0))
            check_ticks(ticks)
            np.testing.assert_allclose(result, whole[:, rows], rtol=0, atol=1e-4)
            assert not [tick.note for tick in ticks if tick.note]
        assert predictor.last_notes() == [
            "2 pixels are NaN or infinite; they are background."
        ]
    finally:
        predictor.close()


@pytest.mark.parametrize("limit", [0, -1.0, float("nan")])
def test_no_memory_is_refused(limit, model, image):
    with pytest.raises(BadInput, match=f"limit of {limit} GB leaves nothing"):
        predict(image, model, memory_limit=limit)


def test_too_little_memory_is_refused_and_enough_is_named(model, image):
    with pytest.raises(BadInput, match="limit of 1e-06 GB is too low") as told:
        predict(image, model, memory_limit=1e-6)
    enough = float(re.findall(r"allow ([\d.]+) GB", str(told.value))[0])
    np.testing.assert_array_equal(
        predict(image, model, memory_limit=enough), predict(image, model)
    )


def test_tiles_are_read_while_grey_values_are_counted(monkeypatch, model):
    is_read, waited = threading.Event(), []
    count, read = Transfers.count, Source.read_mirrored

    def slow_count(self, values):
        waited.append(is_read.wait(10))
        return count(self, values)

    def read_mirrored(self, *box):
        is_read.set()
        return read(self, *box)

    monkeypatch.setattr(Transfers, "count", slow_count)
    monkeypatch.setattr(Source, "read_mirrored", read_mirrored)
    image = random_image((1, 90, 80))
    found = predict(image[0], model, tile_shape=(32, 32))
    assert waited == [True]
    np.testing.assert_allclose(found, reference(model, image), atol=1e-4)


def test_closing_ends_what_runs_beside(image, model):
    """As objects that are made of a large plane."""
    begun = threading.Event()

    def endless_steps():
        while True:
            begun.set()
            yield

    predictor = Predictor(image, model)
    running = predictor.submit_steps(endless_steps())
    assert begun.wait(5)
    predictor.close()
    with pytest.raises(Cancelled):
        running.result(timeout=5)


def test_nothing_runs_before_the_first_step(image):
    predict_steps(image, slow_model(1)).close()
    assert not engine_threads()


def test_the_model_is_left_as_it_is(image, model):
    before = {k: v.clone() for k, v in model.network.state_dict().items()}
    wanted = reference(model, image[None])
    model.network.train()
    try:
        # Predicted as if it were not being trained.
        np.testing.assert_allclose(predict(image, model), wanted, atol=1e-4)
        assert model.network.training
        assert all(p.requires_grad for p in model.network.parameters())
    finally:
        model.network.eval()
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(m._forward_pre_hooks for m in model.network.modules())


def test_a_failing_source_is_not_swallowed(model):
    class Broken:
        shape, dtype, ndim = (30, 30), np.dtype("u1"), 2

        def __getitem__(self, index):
            raise OSError("the disk is gone")

    with pytest.raises(BadInput, match="cannot be read: the disk is gone"):
        predict(Broken(), model)


# --- out of memory -------------------------------------------------------------


SIGNS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("MPS backend out of memory"),
]


@pytest.fixture
def limited(monkeypatch):
    """Return a function that makes the network fail above a number of pixels.

    It returns the list of the inputs that were computed.
    """

    def limit(pixels: float, error: Exception = SIGNS[0]):
        forward, computed = UNet.forward, []

        def limited_forward(self, image, cropping=None):
            if image[0, 0].numel() > pixels:
                raise error
            computed.append(tuple(image.shape[2:]))
            return forward(self, image, cropping)

        monkeypatch.setattr(UNet, "forward", limited_forward)
        return computed

    return limit


@pytest.mark.parametrize("error", SIGNS, ids=str)
def test_tiles_are_halved_until_they_fit(error, limited, model, in_flight):
    image = random_image((1, 300, 260))[0]
    wanted = reference(model, image[None])
    computed = limited(150**2, error)
    ticks, result = collect(predict_steps(image, model, tile_shape=(512, 512)))
    np.testing.assert_allclose(result, wanted, atol=1e-4)
    check_ticks(ticks)
    notes = [tick.note for tick in ticks if tick.note]
    assert notes == ["Memory ran out on cpu; going on with smaller tiles."]
    assert len(computed) == ticks[-1].total


def test_finished_tiles_are_kept(monkeypatch, model):
    """Memory runs out at the fourth of six tiles; only three are split."""
    image = random_image((1, 256, 384))[0]
    wanted = reference(model, image[None])
    forward, calls, computed = UNet.forward, [], []

    def fail_once(self, tile, cropping=None):
        calls.append(tile.shape)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("out of memory")
        computed.append(tile.shape)
        return forward(self, tile, cropping)

    monkeypatch.setattr(UNet, "forward", fail_once)
    ticks, result = collect(predict_steps(image, model, tile_shape=(128, 128)))
    np.testing.assert_allclose(result, wanted, atol=1e-4)
    assert len(computed) == 3 + 3 * 2
    check_ticks(ticks)
    assert ticks[-1].total == 12


def test_the_planes_to_come_are_split_too(limited, model):
    image = random_image((1, 3, 300, 100))[0]
    wanted = predict(image, model, axes="ZYX")
    limited(40_000)
    failures = []
    network_run = Backend.run

    def run(self, image, keep, **options):
        try:
            return network_run(self, image, keep, **options)
        except torch.OutOfMemoryError:
            failures.append(image.shape[1:])
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backend, "run", run)
        ticks, result = collect(
            predict_steps(image, model, axes="ZYX", tile_shape=(300, 100))
        )
    np.testing.assert_allclose(result, wanted, atol=1e-4)
    check_ticks(ticks)
    assert len(failures) == 1


def test_tiles_of_a_valid_network_are_halved(limited):
    model = trained_model(padding="valid")
    image = random_image((1, 260, 200))[0]
    wanted = predict(image, model, tile_shape=(512, 512))
    limited(180**2)
    result = predict(image, model, tile_shape=(512, 512))
    np.testing.assert_allclose(result, wanted, atol=1e-4)


def test_blended_tiles_are_halved(limited):
    model = trained_model(norm="instance")
    image = random_image((1, 460, 200))[0]
    wanted = predict(image, model, tile_shape=(230, 200))
    limited(180**2)
    result = predict(image, model, tile_shape=(230, 200))
    np.testing.assert_allclose(result.sum(axis=0), 1, atol=1e-5)
    # Every tile has statistics of its own.
    assert np.abs(result - wanted).mean() < 0.05


def test_halving_while_rescaling_and_augmenting(limited, model):
    passport = model.passport.model_copy(update={"pixel_size": (0.5, 0.5)})
    model = Model(model.network, passport)
    image = random_image((1, 150, 190))[0]
    options = {"pixel_size": {"Y": 1.0, "X": 1.0}, "test_time_augmentation": True}
    wanted = predict(image, model, **options)
    limited(200**2)
    result = predict(image, model, tile_shape=(512, 512), **options)
    np.testing.assert_allclose(result, wanted, atol=1e-4)


def test_nothing_fits(limited, model, image):
    limited(0)
    with pytest.raises(OutOfMemory, match="even for the smallest tile"):
        predict(image, model)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("x")],
    ids=str,
)
def test_other_errors_pass(error, limited, model, image):
    limited(0, error)
    with pytest.raises(type(error), match=str(error)):
        predict(image, model)


# --- devices -------------------------------------------------------------------


class FullGpu:
    """A backend on a GPU without memory."""

    device = torch.device("cuda")
    max_input_pixels = 10**6
    transfers = Transfers(torch.device("cpu"))

    def run(self, image, keep, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def release(self):
        pass

    close = release


def test_a_full_gpu_gives_way_to_the_cpu(monkeypatch, model, in_flight):
    image = random_image((1, 500, 480))[0]
    monkeypatch.setattr(engine, "choose_device", lambda wanted: Device("cuda"))
    monkeypatch.setattr(
        engine,
        "Backend",
        lambda network, device, **options: (
            FullGpu() if device == "cuda" else Backend(network, device, **options)
        ),
    )
    ticks, result = collect(predict_steps(image, model, tile_shape=(512, 512)))
    np.testing.assert_allclose(result, reference(model, image[None]), atol=1e-4)
    check_ticks(ticks)
    # Tiles that are nearly all halo are not left to the CPU.
    assert ticks[-1].total <= 8
    assert [tick.note for tick in ticks if tick.note] == [
        "Memory ran out on cuda; going on with smaller tiles.",
        "Memory ran out on cuda; going on on the CPU, which is slower.",
    ]


def test_a_gpu_that_is_full_from_the_start_is_left(monkeypatch, model, image):
    def full(network, device, **options):
        if device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return Backend(network, device, **options)

    monkeypatch.setattr(engine, "choose_device", lambda wanted: Device("cuda"))
    monkeypatch.setattr(engine, "Backend", full)
    ticks, result = collect(predict_steps(image, model))
    np.testing.assert_allclose(result, reference(model, image[None]), atol=1e-4)
    notes = [tick.note for tick in ticks if tick.note]
    assert notes == ["cuda is full; computing on the CPU."]


FAILURES = [
    RuntimeError("CUDA error: no kernel image is available for execution."),
    torch.OutOfMemoryError("CUDA out of memory."),
    AssertionError("Torch not compiled with CUDA enabled"),
    RuntimeError(""),
]


@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_a_gpu_that_does_not_work_is_left(error, monkeypatch, model, image):
    def fail(*args, **kwargs):
        assert kwargs["device"] == "cuda"
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends.torch, "ones", fail)
    device = choose_device("auto")
    assert device.name == "cpu"
    assert device.note.startswith("The GPU cannot be used (")
    assert device.note.endswith("); computing on the CPU.")
    assert str(error).split(".")[0] in device.note
    with pytest.raises(BadInput, match=r"device 'cuda' cannot be used: .*'cpu'"):
        choose_device("cuda")
    ticks, result = collect(predict_steps(image, model))
    assert [tick.note for tick in ticks if tick.note] == [device.note]
    np.testing.assert_allclose(result, reference(model, image[None]), atol=1e-4)


def test_a_gpu_that_computes_nonsense_is_left(monkeypatch):
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends.torch, "ones", lambda *shape, device: 2 * ones(*shape))
    assert "wrong results" in choose_device("auto").note


@pytest.mark.parametrize("wanted", ["cuda", "cuda:0", "cuda:99", "cuda:x", "mps"])
def test_a_missing_device_is_refused(wanted, model, image):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this computer has a GPU")
    with pytest.raises(BadInput, match=f"device '{wanted}' cannot be used"):
        predict(image, model, device=wanted)


def test_cpu_needs_no_probe(monkeypatch):
    monkeypatch.setattr(backends, "_problem", lambda name: "must not be asked")
    assert choose_device("cpu") == Device("cpu")
