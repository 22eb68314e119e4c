"""``python -m minidp.demo``: N workers against one, on real digits."""
