"""What an adapter knows of sizes: of the pictures or videos that are asked for, and of latents.

Shape letter: B samples.
"""

from __future__ import annotations

from collections.abc import Callable

from selfnpo_fast.models.conditioning import Conditioning
from selfnpo_fast.models.family import Family
from selfnpo_fast.models.size import AskedSize, Size
from selfnpo_fast.runtime.errors import UserError


class HasSize:
    """The part of `base.Adapter` that is about sizes. Subclasses say what a latent is."""

    family: Family
    path: str
    _asked: AskedSize

    @property
    def default_size(self) -> Size:
        """The size of the pictures or videos that the model was made for."""
        raise NotImplementedError

    @property
    def size(self) -> Size:
        """The size of what is trained on or drawn. Raises UserError where the model names none, and
        a side is not given."""
        return self._filled(self._asked, lambda: self.default_size)

    def size_of(self, asked: AskedSize) -> Size:
        """The size of a call, the adapter's where nothing is asked for."""
        return self._filled(asked, lambda: self.size)

    def _filled(self, asked: AskedSize, default: Callable[[], Size]) -> Size:
        """What is asked for, and the rest by `default`, which is called where it is needed."""
        known = asked.has_sides and not (asked.frames is None and self.family.draws_videos)
        return asked.of(Size(0, 0) if known else default())

    @property
    def resolution(self) -> int:
        """Height and width in pixels of square pictures. Raises UserError where they differ."""
        size = self.size
        if size.height != size.width:
            raise UserError(
                f"model.resolution: {self.path} draws pictures of {size.height} x {size.width} pixels, and square "
                "ones are needed here; give a resolution"
            )
        return size.height

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one latent, of any rank."""
        return self.latent_shape_of(self.size, self._size_field)

    @property
    def _size_field(self) -> str:
        """What errors about the size name, as in `latent_shape_of`."""
        return "model.resolution" if self._asked.height is None else "model."

    def latent_shape_of(self, size: Size, field: str = "") -> tuple[int, ...]:
        """The shape of the latent of a picture or video of this size.

        Raises UserError for a size that the model cannot draw, naming `side_field(field, side)`:
        the field, or with a section ("model.") or nothing the side in it.
        """
        raise NotImplementedError

    def check_size(self) -> None:
        """UserError that names the field where the size is none that the model can draw."""
        self.latent_shape_of(self.size, self._size_field)

    def smaller_sizes(self, size: Size) -> list[Size]:
        """Sizes that doctor proposes where a run needs too much memory; none of pictures, which a
        model draws badly at other sizes than its own."""
        return []

    def sized(self, cond: Conditioning, size: Size) -> Conditioning:
        """The rows for another size than the adapter's."""
        return cond
