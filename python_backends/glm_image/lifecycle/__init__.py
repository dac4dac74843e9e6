"""A request in flight: its context, registry, events, deadlines and estimates. Imports no torch."""
