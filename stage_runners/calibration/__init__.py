"""Measuring a device: its operators at many sizes, its ceilings, and what its host spends around them."""

from stage_runners.calibration.session import calibrate

__all__ = ["calibrate"]
