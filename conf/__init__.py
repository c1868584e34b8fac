"""The configuration of `lightning-compress`; other projects add `pkg://lightning_compress.conf` to their searchpath."""
