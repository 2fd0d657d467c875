"""Flat pieces of host memory: what lies in them and when they are given back."""

import gc

import pytest
import torch

from photogram.worker.host_memory import HostMemory, lay_out


def test_tensors_lie_in_flat_memory_with_their_values_and_the_order_of_their_elements():
    tensors = [
        torch.randn(3, 5),
        torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(7).to(torch.bfloat16),
        torch.tensor(3.5, dtype=torch.float64),
        torch.randn(4, 6)[:, ::2],
    ]
    places, num_bytes = lay_out(tensors)
    flat = HostMemory(num_bytes).flat
    views = [place.of(flat) for place in places]
    for view, tensor in zip(views, tensors, strict=True):
        view.copy_(tensor)
    for view, tensor in zip(views, tensors, strict=True):
        assert view.dtype == tensor.dtype
        assert torch.equal(view, tensor)
    assert views[1].is_contiguous(memory_format=torch.channels_last)
    assert views[4].is_contiguous(), "what has gaps is laid out without"
    assert all(place.offset % 256 == 0 for place in places)


def test_memory_lives_as_long_as_a_view_of_it_and_is_unpinned_before_it_goes(monkeypatch):
    calls: list[tuple[str, int]] = []

    class Runtime:
        def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
            calls.append(("pinned", address))
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            calls.append(("unpinned", address))
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    memory = HostMemory(10_000)
    memory.flat.fill_(7)
    address = memory.flat.data_ptr()
    assert memory.pin()
    assert memory.flat.sum() == 70_000
    view = memory.flat[100:200]
    del memory
    gc.collect()
    assert calls == [("pinned", address)]
    assert (view == 7).all()
    del view
    gc.collect()
    assert calls == [("pinned", address), ("unpinned", address)]


@pytest.mark.parametrize("touch", [False, True])
def test_memory_that_cannot_be_pinned_is_used_as_it_is_and_the_log_says_so(touch, monkeypatch, caplog):
    class Runtime:
        def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    memory = HostMemory(1000)
    assert not memory.pin(touch=touch)
    assert "could not be pinned" in caplog.text
    assert (memory.flat == 0).all()


def test_no_bytes_are_a_piece_too():
    assert HostMemory(0).flat.shape == (0,)
