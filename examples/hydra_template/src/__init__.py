"""The project: a network, data, and the command that trains."""
