"""Scenario × attack → Result, kept in a store; sweeps of them; tuning; claims."""
