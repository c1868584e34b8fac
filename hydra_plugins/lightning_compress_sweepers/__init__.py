"""Sweepers, where Hydra looks for them: it imports all modules below `hydra_plugins` whenever it starts."""
