"""``python -m minidp.plan``: how far does a model scale on machines that one does not have?"""
