"""Pools of stages, Envoy and a gateway as processes of one machine: ``scripts/fleet``."""
