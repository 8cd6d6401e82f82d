"""Being told how a build goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blipstream.contract import QFORMER, VISION_ENCODER

if TYPE_CHECKING:
    from blipstream_export.needs import Needs

STAGES = ("checkpoint", "reference", VISION_ENCODER, QFORMER, "decoder", "bundle", "parity")
"""Names of the stages of a build, in their order."""


class BuildObserver:
    """Is told how a build goes; each method does nothing unless a subclass says what."""

    def needs(self, needs: Needs) -> None:
        """The checkpoint has been opened, and this is what the rest will take."""

    def stage(self, name: str) -> None:
        """The stage called ``name``, one of :data:`STAGES`, begins."""

    def progress(self, done: int, total: int) -> None:
        """So much of the stage's work is done, of so much; not every stage tells."""
