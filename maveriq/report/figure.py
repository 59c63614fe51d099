"""A matplotlib figure that a notebook shows as an image. Import this module late: it imports matplotlib."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A figure that does not need pyplot: a notebook shows only those of pyplot by itself."""

    def _repr_png_(self) -> bytes:
        """Return the figure as a PNG image."""
        image = io.BytesIO()
        self.savefig(image, format="png")
        return image.getvalue()
