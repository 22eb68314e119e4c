"""The contestants, a file each. Every rank is a process of its own that waits on a socket for its next burst.

    serve.py    what all have in common: connect, prepare a job, run bursts of it
    ours.py     minidp: one process alone, or ranks that ``minidp.spawn`` starts
    ps.py       minidp's parameter server, for ps; ps_async.py without waiting for anybody
    ray.py      a Ray actor as a parameter server
    slab.py     minidp's zero-copy exchange, for allreduce
    eager.py    PyTorch, one process
    ddp.py      PyTorch DistributedDataParallel over gloo
    clock.py    not a contestant: when a spawned function runs, for startup
    mpich.py    mpi4py over MPICH, under mpiexec; training is PyTorch with one all-reduce of all gradients

PyTorch, mpi4py and Ray are imported here only, in these processes.
"""
