"""Pictures of training and of what a network has learned. They need Matplotlib: ``pip install 'gpucnn[plot]'``."""

from gpucnn.visualize.confusion import draw_confusion
from gpucnn.visualize.curves import draw_curves
from gpucnn.visualize.filters import draw_filters
from gpucnn.visualize.gradcam import draw_grad_cam, grad_cam

__all__ = ["draw_confusion", "draw_curves", "draw_filters", "draw_grad_cam", "grad_cam"]
