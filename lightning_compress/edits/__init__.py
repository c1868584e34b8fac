"""Edits: structural changes as plain data, and the only code that carries them out.

An edit says *what* changes, never *why*: it can be written to JSON, stored in a checkpoint and replayed on a
trained network (weights are carried over) or on a skeleton (shapes only). The ordered list of the edits a network
has been through is its `history`; the checkpoint, the artifact and the report all read that one list.
"""

from lightning_compress.edits.companions import ROLES, Companions, companion, companions
from lightning_compress.edits.keep import Attribute, Keep
from lightning_compress.edits.quantize import Quantize
from lightning_compress.edits.replace import Replace
from lightning_compress.edits.replay import (
    EDIT_KINDS,
    Edit,
    apply_edits,
    edits_from_json,
    edits_to_json,
    history,
    rewind_edits,
)
from lightning_compress.edits.specs import Spec, build, describe
from lightning_compress.edits.structure import Change, EditError, Replacement, named_tensors, owner, renew, skeleton

__all__ = [
    "EDIT_KINDS",
    "ROLES",
    "Attribute",
    "Change",
    "Companions",
    "Edit",
    "EditError",
    "Keep",
    "Quantize",
    "Replace",
    "Replacement",
    "Spec",
    "apply_edits",
    "build",
    "companion",
    "companions",
    "describe",
    "edits_from_json",
    "edits_to_json",
    "history",
    "named_tensors",
    "owner",
    "renew",
    "rewind_edits",
    "skeleton",
]
