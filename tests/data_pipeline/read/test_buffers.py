"""Laws of the batches' memory: a buffer is used again only when no code holds it."""

import gc
import threading

import torch

from flowmask.data_pipeline.read.buffers import Buffers

WANTED = {"a": ((3, 5), torch.bfloat16), "b": ((7,), torch.bool), "c": ((2, 0, 4), torch.float32)}


def test_tensors_have_the_asked_shape_and_do_not_overlap():
    given = Buffers().tensors(WANTED)
    assert {name: (tuple(t.shape), t.dtype) for name, t in given.items()} == WANTED
    given["a"].fill_(1)
    given["b"].fill_(False)
    assert (given["a"] == 1).all()


def test_memory_is_given_out_again_only_when_its_last_view_is_gone():
    buffers = Buffers()
    first = buffers.tensors(WANTED)
    place, view = first["a"].data_ptr(), first["b"][2:]
    del first
    gc.collect()
    assert buffers.tensors(WANTED)["a"].data_ptr() != place, "a view of b is alive"
    del view
    gc.collect()
    assert place in {held["a"].data_ptr() for held in [buffers.tensors(WANTED) for _ in range(2)]}


def test_threads_never_share_memory_that_is_in_use():
    buffers, wrong = Buffers(), []

    def work(number):
        for turn in range(300):
            held = buffers.tensors({"x": ((50 + turn % 7,), torch.int64)})["x"]
            held.fill_(number)
            if not (held == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_kept_free_is_bounded(monkeypatch):
    monkeypatch.setattr("flowmask.data_pipeline.read.buffers._KEPT_BYTES", 1000)
    buffers = Buffers()
    held = [buffers.tensors({"x": ((300 + i,), torch.uint8)}) for i in range(50)]
    held.clear()
    gc.collect()
    held.append(buffers.tensors(WANTED))
    assert sum(free.nbytes for free in buffers._free) <= 1000 and not buffers._returned
