"""Callbacks: when edits happen in a Trainer's run. No tensor maths here."""
