"""``python -m minidp.doctor``: what this machine has, and what therefore works.

facts.py       what can be known of a machine: plain values, so that tests can invent machines
host.py        the processor, memory, software: looked up in this process
trials.py      the CPU's worlds: each is really tried
cuda_probe.py  the GPUs, from the driver up: a process of its own, since a broken driver may hang or crash
pair_probe.py  two ranks on GPUs: the same
probe.py       runs these two with a time limit, and reads what they say, also when they say no more
verdicts.py    facts → what works, why, and the command that helps
report.py      the page
"""
