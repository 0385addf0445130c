"""The CPU image, built and run without a daemon (buildah, podman): its size, its times, and what it may not do.

Begin with `trial.py`.
"""
