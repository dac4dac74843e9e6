"""Instances that span several devices: ranks, process groups, collectives."""
