"""Deprecated: use `fastsched.measurement.to_file.measure_to_file`."""

import warnings

from fastsched.measurement.to_file import measure_to_file as measure_to_file

warnings.warn("fastsched.measure_file is now fastsched.measurement.to_file", DeprecationWarning, stacklevel=2)
