"""What guards the families nobody has looked at: the check at first use, and the reading of a device's errors."""

import torch

from photogram.core.errors import OutOfMemory
from photogram.worker.memory import DeviceLost, device_error

from .drawing import Studio
from .test_families_served import requests_of


def test_a_model_that_mixes_its_rows_is_served_unstacked_and_right(family_folder, tmp_path, caplog):
    reference = Studio(family_folder("flux-1"), tmp_path, max_batch_size=1)
    studio = Studio(family_folder("flux-1"), tmp_path)
    for each in (reference, studio):
        transformer = each.served.modules["transformer"]
        real = transformer.real["forward"]

        def mixing(*args, real=real, **kwargs):
            """As a batch norm would: what a row gives depends on the others."""
            (noise,) = real(*args, **kwargs)
            return (noise + noise.mean(dim=0, keepdim=True),)

        transformer.real["forward"] = mixing
    expected = reference.draw(requests_of("flux-1"))
    drawn = studio.draw(requests_of("flux-1"))
    sizes = [len(jobs) for jobs in studio.passes("transformer")]
    assert max(sizes) > 1, "nothing was stacked, so nothing was checked"
    assert set(sizes[1:]) == {1}, f"stacked again after the check: {sizes}"
    assert "run alone" in caplog.text
    for job_id, result in drawn.items():
        assert (result.latents == expected[job_id].latents).all()


def test_a_stacked_pass_that_raises_is_run_alone(family_folder, tmp_path):
    studio = Studio(family_folder("flux-1"), tmp_path)
    transformer = studio.served.modules["transformer"]
    real = transformer.real["forward"]

    def one_row_only(*args, **kwargs):
        if kwargs["hidden_states"].shape[0] > 1:
            raise RuntimeError("this model takes one row")
        return real(*args, **kwargs)

    transformer.real["forward"] = one_row_only
    drawn = studio.draw(requests_of("flux-1"))
    assert all(result.failure is None for result in drawn.values())


def test_device_errors_are_told_apart():
    cpu = torch.device("cpu")
    assert isinstance(device_error(torch.OutOfMemoryError("CUDA out of memory."), cpu), OutOfMemory)
    allocator = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
    assert isinstance(device_error(allocator, cpu), OutOfMemory)
    sticky = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    assert isinstance(device_error(sticky, cpu), DeviceLost)
    harmless = ValueError("a bug")
    assert device_error(harmless, cpu) is harmless
