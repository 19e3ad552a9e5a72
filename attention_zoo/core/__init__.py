"""The interface of an attention, and the registry."""
