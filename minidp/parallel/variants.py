"""Which class a ``DataParallel(…)`` becomes: the same arguments and results, by other means."""

from __future__ import annotations

from minidp.comm import Communicator
from minidp.parallel.bucketed import BucketedDataParallel
from minidp.parallel.compressed import CompressedDataParallel
from minidp.parallel.data_parallel import DataParallel
from minidp.parallel.late import LateBucketedDataParallel, LateDataParallel


def variant_of(cls: type[DataParallel], comm: Communicator, compresses: bool) -> type[DataParallel]:
    """``cls`` itself, unless it is ``DataParallel``: then what fits to where arrays lie and how they travel.

    A subclass by a user is taken as it is, on a device too: there one of ``DataParallel`` waits for the device in
    each step, to see whether the gradient is finite, and one of ``late.LateDataParallel`` does not.
    TypeError if a subclass can't do what is asked for.
    """
    if compresses and not issubclass(cls, CompressedDataParallel):
        if cls is not DataParallel:
            raise TypeError(f"{cls.__name__} does not compress: derive it from CompressedDataParallel")
        return CompressedDataParallel
    if issubclass(cls, BucketedDataParallel | CompressedDataParallel):
        return cls
    if cls is not DataParallel:
        if not comm.shares_memory:
            raise TypeError(f"{cls.__name__} needs shared memory: derive it from BucketedDataParallel")
        return cls
    if comm.device.on_host:
        return DataParallel if comm.shares_memory else BucketedDataParallel
    return LateDataParallel if comm.shares_memory else LateBucketedDataParallel
