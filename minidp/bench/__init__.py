"""``python -m minidp.bench``: how fast it is, next to PyTorch, MPI and Ray on the same machine in the same minute.

    allreduce     our all-reduce, MPICH's, gloo's          4 KB … 128 MB, 2 ranks
    step          one training step, ours and PyTorch's    one process, one thread
    scaling       2 workers against 1; DDP, PyTorch + MPI  2 processes
    micro-shards  the same bits for any N, and its price   one process, one thread
    ps            a parameter server, ours and Ray's       1 worker, 1 server; virtual: 4 workers
    whereabouts   what always knowing ranks' places costs  one process, one thread
    faults        who is told, how soon, and what is left  3 processes, again and again
    startup       import, and until a spawned function runs

Absolute figures of a shared machine drift by a factor of two within minutes; ratios of bursts that follow each
other do not. So all contestants are started first, wait blocked on a socket, and are let off one after the other,
ours, peer, ours, peer, …; what is printed are medians over such rounds.

    jobs.py      what is done: an all-reduce of n bytes, a training step of an MLP
    peers/       how each contestant does it, a file each; runs in processes of its own
    roster.py    the contestants: what each needs, how its processes are launched
    team.py      the processes of one contestant: start, command, end
    contest.py   all teams that can start, and the same job for each
    measure.py   rounds, medians, ratios, bars
    report.py    the table and the JSON file; machine.py its header line, screen.py the progress before it
"""
