"""CuPy's ``cupy.cuda.nccl`` without a GPU: the same names and signatures, on the memory of the device's double.

Ranks meet over a socket that rank 0 opens when it is asked for the unique id. Sums are made in an order that is
not that of the ranks. What a call leads to is seen as on a GPU: until somebody joins the stream in which it was
asked for, there is rubbish in the result; and whoever drops the memory of an array before is told.
"""

from __future__ import annotations

import os
import weakref
from multiprocessing.connection import Client, Connection, Listener
from types import SimpleNamespace
from typing import Any

import numpy as np

from minidp.backend.device import Beside
from tests import device_double
from tests.device_double import DeviceArray
from tests.strict_device import StrictDevice

MAIN, SIDE = 1, 2
PATIENCE_S = 10
RUBBISH = 0xAB

available = True
NCCL_SUM, NCCL_PROD, NCCL_MAX, NCCL_MIN, NCCL_AVG = range(5)
NCCL_INT8, NCCL_UINT8, NCCL_INT32, NCCL_UINT32, NCCL_INT64, NCCL_UINT64 = range(6)
NCCL_FLOAT16, NCCL_FLOAT32, NCCL_FLOAT64, NCCL_BFLOAT16 = range(6, 10)
_DTYPES = ("int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64")
_REDUCE = {NCCL_SUM: np.add, NCCL_MAX: np.maximum, NCCL_MIN: np.minimum, NCCL_AVG: np.add}

calls: list[str] = []  # of this process
_listeners: dict[bytes, Listener] = {}
_stream = MAIN
_under_way: list[tuple[np.ndarray, np.ndarray, list[Any]]] = []  # memory, what it will hold, arrays that must live
_memory: dict[int, weakref.ref[np.ndarray]] = {}  # by address, whose pointer was asked for


class NcclError(RuntimeError):
    pass


def get_unique_id() -> bytes:
    name = f"\0nccl-{os.getpid()}-{len(_listeners)}"
    secret = name.encode().ljust(128, b"\0")
    _listeners[secret] = Listener(name, "AF_UNIX")
    calls.append("get_unique_id")
    return secret


class NcclCommunicator:
    def __init__(self, ndev: int, commId: bytes, rank: int, config: Any = None) -> None:
        assert (type(ndev), type(commId), type(rank), config) == (int, bytes, int, None)
        assert len(commId) == 128
        calls.append(f"init {ndev}")
        self._size, self._rank, self._open = ndev, rank, True
        self._peers: dict[int, Connection] = {}
        if rank == 0:
            for _ in range(ndev - 1):
                peer = _listeners[commId].accept()
                self._peers[peer.recv()] = peer
        else:
            name = b"\0" + commId.strip(b"\0")
            self._peers[0] = Client(name.decode(), "AF_UNIX")
            self._peers[0].send(rank)

    def abort(self) -> None:
        calls.append("abort")
        self._open = False

    def allReduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int) -> None:  # noqa: N802
        assert datatype != NCCL_FLOAT16, "would be added in half precision"
        self._run("allReduce", sendbuf, count, recvbuf, count, datatype, op, stream)

    def reduceScatter(  # noqa: N802
        self, sendbuf: int, recvbuf: int, recvcount: int, datatype: int, op: int, stream: int
    ) -> None:
        assert datatype != NCCL_FLOAT16, "would be added in half precision"
        self._run("reduceScatter", sendbuf, recvcount * self._size, recvbuf, recvcount, datatype, op, stream)

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:  # noqa: N802
        self._run("allGather", sendbuf, count, recvbuf, count * self._size, datatype, 0, stream)

    def broadcast(self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int) -> None:
        self._run("broadcast", sendbuff, count, recvbuff, count, datatype, root, stream)

    def _run(
        self, call: str, send: int, n: int, recv: int, m: int, datatype: int, extra: int, stream: int
    ) -> None:
        assert self._open, "aborted"
        assert {type(a) for a in (send, n, recv, m, datatype, extra, stream)} == {int}
        assert stream == SIDE == _stream, "asked for in another stream than the current one"
        calls.append(call)
        dtype = np.dtype(_DTYPES[datatype])
        source, target = _array(send, n, dtype), _array(recv, m, dtype)
        for memory, result, _ in _under_way:  # in a stream one comes after the other
            memory[...] = result
        same = call, n, m, datatype, extra
        if self._rank == 0:
            given = {0: source.copy()}
            for rank, peer in self._peers.items():
                theirs, given[rank] = _recv(peer)
                assert theirs == same, f"NCCL would hang: rank {rank} calls {theirs}, rank 0 {same}"
            results = _results(call, [given[rank] for rank in range(self._size)], extra)
            for rank, peer in self._peers.items():
                peer.send(results[rank])
            result = results[0]
        else:
            self._peers[0].send((same, source.copy()))
            result = _recv(self._peers[0])
        _under_way.append((target, result, [_memory[send], _memory[recv]]))
        for memory, _, _ in _under_way:
            memory.view(np.uint8)[...] = RUBBISH


def _array(address: int, count: int, dtype: np.dtype) -> np.ndarray:
    """The array at that address, of whose memory the pointer was asked for."""
    memory = _memory[address]()
    assert memory is not None, "memory that has been dropped"
    start = address - memory.ctypes.data
    data = memory.reshape(-1).view(np.uint8)[start : start + count * dtype.itemsize]
    assert data.nbytes == count * dtype.itemsize, "beyond the end"
    return np.frombuffer(data.data, dtype)


def _recv(peer: Connection) -> Any:
    if not peer.poll(PATIENCE_S):
        raise NcclError("a rank has not come")
    return peer.recv()


def _results(call: str, given: list[np.ndarray], extra: int) -> list[np.ndarray]:
    p = len(given)
    if call == "broadcast":
        return [given[extra]] * p
    if call == "allGather":
        return [np.concatenate(given)] * p
    total = given[-1].copy()
    for part in reversed(given[:-1]):
        _REDUCE[extra](total, part, out=total)
    if extra == NCCL_AVG:
        total /= p
    return np.split(total, p) if call == "reduceScatter" else [total] * p


class _Side(Beside):
    def __enter__(self) -> None:
        global _stream
        assert _stream == MAIN
        _stream = SIDE

    def __exit__(self, *_: object) -> None:
        global _stream
        _stream = MAIN

    def join(self) -> None:
        for memory, result, alive in _under_way:
            assert all(each() is not None for each in alive), "dropped while NCCL works on it"
            memory[...] = result
        _under_way.clear()


class NcclDouble(StrictDevice):
    """A double a rank, and NCCL between them. In processes only: it changes the double's array type."""

    def __init__(self) -> None:
        super().__init__(places=8)

    def start(self, local_rank: int = 0) -> None:
        super().start(local_rank)
        DeviceArray.data = property(_pointer)
        device_double.xp.cuda = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=_stream))

    def library(self) -> Any:
        import tests.fake_nccl

        return tests.fake_nccl

    def beside(self) -> Beside:
        return _Side()


def _pointer(array: DeviceArray) -> Any:
    """``.data``, of which ``.ptr`` is the address. As ``cupy.ndarray.data`` it knows what it points to."""
    memory = array._host
    while isinstance(memory.base, np.ndarray):
        memory = memory.base
    address = array._host.ctypes.data
    _memory[address] = weakref.ref(memory)
    return SimpleNamespace(ptr=address)
