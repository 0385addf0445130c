"""Replicas behind a load balancer, as processes of this machine: what a rolling restart and a kill lose.

It uses the balancers' configurations that are shipped. Begin with `scenario.py`.
"""
