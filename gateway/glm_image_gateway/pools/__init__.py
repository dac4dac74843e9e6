"""Pools of servers that each serve one stage, in place of one server of both."""
